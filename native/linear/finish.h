// From sums to floats, on the vectors of the file's instruction set.
#pragma once
#include "linear/linear.h"

namespace nf::NF_ARCH {

template <int E>
inline F32 activate(F32 x) {
  if constexpr (E == NF_RELU) return relu(x);
  if constexpr (E == NF_GELU) return gelu(x);
  if constexpr (E == NF_GELU_TANH) return gelu_tanh(x);
  if constexpr (E == NF_SILU) return silu(x);
  return x;
}

template <int E, bool Full>
inline void finish_rows(const Finish& f) {
  constexpr int N = F32::N, V = kPanel / N;
  F32 scale[V], bias[V];
  for (int j = 0; j < V; ++j) {
    scale[j] =
        Full ? F32::load(f.scale + j * N) : F32::load(f.scale + (j * N < f.columns ? j * N : 0), f.columns - j * N);
    bias[j] = F32::set(0.f);
    if (f.bias)
      bias[j] =
          Full ? F32::load(f.bias + j * N) : F32::load(f.bias + (j * N < f.columns ? j * N : 0), f.columns - j * N);
  }
  for (int64_t m = 0; m < f.rows; ++m) {
    const F32 row_scale = F32::set(f.row_scale[m * f.row_stride]);
    const I32 correction = I32::set(f.correction ? f.correction[m] : 0);
    float* y = f.y + m * f.y_stride;
    const float* residual = f.residual ? f.residual + m * f.y_stride : nullptr;
    for (int j = 0; j < V; ++j) {
      const int left = f.columns - j * N;
      if (!Full && left <= 0) break;
      const I32 sum = I32::load(f.sums + m * kPanel + j * N) - correction;
      F32 v = to_float(sum) * (row_scale * scale[j]);
      if (f.bias) v = v + bias[j];
      v = activate<E>(v);
      if (residual) v = v + (Full ? F32::load(residual + j * N) : F32::load(residual + j * N, left));
      if (Full) v.store(y + j * N);
      else v.store(y + j * N, left);
    }
  }
}

// f(the epilogue of a call, as a constant)
template <class F>
inline void with_epilogue(int32_t epilogue, const F& f) {
  switch (epilogue) {
    case NF_RELU: return f(std::integral_constant<int, NF_RELU>());
    case NF_GELU: return f(std::integral_constant<int, NF_GELU>());
    case NF_GELU_TANH: return f(std::integral_constant<int, NF_GELU_TANH>());
    case NF_SILU: return f(std::integral_constant<int, NF_SILU>());
    default: return f(std::integral_constant<int, NF_NONE>());
  }
}

inline void finish(const Finish& f) {
  with_epilogue(f.epilogue, [&](auto e) { f.columns == kPanel ? finish_rows<e, true>(f) : finish_rows<e, false>(f); });
}

inline int32_t row_sum(const int8_t* a, int64_t count) {
  int32_t s = 0;
  for (int64_t i = 0; i < count; ++i) s += a[i];
  return s;
}

}  // namespace nf::NF_ARCH
