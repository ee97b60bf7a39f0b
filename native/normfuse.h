// C interface of normfuse's CPU kernels. One shared object serves PyTorch (called through ctypes) and ONNX Runtime
// (registered as a custom-op library), so that both run the same integers. No header of either is needed to build it.
//
// Shapes are row-major. All pointers are to the sizes named; none may overlap unless a comment allows it. Functions
// return nullptr, or a static message that says which argument is wrong; they never throw and never abort.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define NF_EXPORT extern "C" __declspec(dllexport)
#else
#define NF_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// -- threads --------------------------------------------------------------------------------------
// Whoever calls brings the threads: ONNX Runtime its own pool, Python the pool of threads.cpp. `run` calls fn(arg, i)
// for every i < total, each exactly once, from any thread, and returns when all are done.
typedef void (*nf_task)(void* arg, size_t i);
struct nf_threads {
  void* context;
  int count;  // how many run at once; 1 means: call fn in a loop
  void (*run)(void* context, size_t total, nf_task fn, void* arg);
};

// -- quantized weights ----------------------------------------------------------------------------
// Y[m, n] = float(Σ_k A[m, k] · (C[n, k] << (E − e[k]))) · row_scale[m] · scale[n] + bias[n]
//   A     int8 activations, |A| <= 127
//   C     codes of `bits` bits, |C| <= 2^(bits-1) - 1
//   e     exponents in 0..E, one an input channel: channels are sorted by it, so that a group is a stretch of k
//   scale already multiplied by 2^-E
// With `multipliers` the channels of an output come in blocks, and exponents are 0:
// Y[m, n] = float(Σ_k A[m, k] · C[n, k] · M[n, k / block]) · row_scale[m] · scale[n] + bias[n]
//   C     -2^(bits-1), too; bits <= 4
//   M     1 <= |M| <= 127 / 2^(bits-1), so that C · M is an integer of 8 bits
// Layout of `packed` (see normfuse/quant/packing.py, which writes it):
//   channels are taken in `order` (sorted by exponent, stable), each exponent's stretch padded to a multiple of 4 with
//   code 0; 4 neighbouring channels are a quad; quads in all, Q, are padded to a multiple of `unit` (8 bits: 1; 4: 2; 6
//   and 2: 4; 3, 5, 7: 8); outputs are padded to panels of 16. Codes are stored as u = C + 2^(bits-1), cut into planes
//   of 8, or of 4, 2 and 1 bits, the lowest bits first. Memory order: [panel][plane][block][64 bytes]; byte (column * 4
//   + channel in quad) of a block of a plane of w bits holds 8 / w consecutive quads, the first one in the lowest bits.
struct nf_weight {
  int64_t n, k;           // outputs, inputs
  int32_t bits;           // 2..8
  int32_t groups;         // E + 1, 1..16
  const int32_t* sizes;   // [groups] channels of each exponent; their sum is k
  const int32_t* order;   // [k] channel at each sorted position; nullptr when groups == 1 (natural order)
  const uint8_t* packed;  // nf_packed_bytes(...) bytes, any alignment
  const float* scale;     // [n]
  const float* bias;      // [n] or nullptr
  // nullptr, or M as [panel][block of channels][16 outputs]; what is beyond n is not read into any output.
  const int8_t* multipliers;
  int32_t block;  // channels: 32, 64, 128 or 256
};
// Gives -1 where an argument is wrong.
NF_EXPORT int64_t nf_packed_bytes(int64_t n, int32_t bits, int32_t groups, const int32_t* sizes);

enum nf_epilogue { NF_NONE = 0, NF_RELU = 1, NF_GELU = 2, NF_GELU_TANH = 3, NF_SILU = 4 };

// -- quantization of activations ------------------------------------------------------------------
// q = clamp(rne(x * (qmax / max|x|)), -qmax, qmax), scale = max|x| / qmax, a row at a time, in float32; a row of zeros
// has scale 1. A row that holds NaN or Inf has scale NaN and codes 0, so that everything computed from it is NaN.
NF_EXPORT const char* nf_quantize_rows(const nf_threads*, const float* x, int64_t rows, int64_t k, int32_t bits,
                                       int8_t* q, float* scale);
// q = clamp(rne(x / scale)): QuantizeLinear with zero point 0, one scale a tensor. NaN gives code 0.
NF_EXPORT const char* nf_quantize_static(const nf_threads*, const float* x, int64_t count, float scale, int32_t bits,
                                         int8_t* q);

// -- products -------------------------------------------------------------------------------------
// act(Y) + residual in float32. `row_stride` 1: one row_scale a row; 0: one for all. `residual` [m, n] or nullptr; y
// may be residual.
NF_EXPORT const char* nf_matmul(const nf_threads*, const nf_weight*, const int8_t* q, const float* row_scale,
                                int64_t row_stride, int64_t m, int32_t epilogue, const float* residual, float* y);
// The same, quantized again by rows to `out_bits`: what the next product reads.
NF_EXPORT const char* nf_matmul_quantize(const nf_threads*, const nf_weight*, const int8_t* q, const float* row_scale,
                                         int64_t row_stride, int64_t m, int32_t epilogue, int32_t out_bits,
                                         int8_t* out_q, float* out_scale);
// float32 in: quantizes x by rows (static_scale <= 0) or with one scale, then nf_matmul.
NF_EXPORT const char* nf_linear(const nf_threads*, const nf_weight*, const float* x, int64_t m, int32_t activation_bits,
                                float static_scale, int32_t epilogue, const float* residual, float* y);
// The bare sums, for tests: acc[m, n] = Σ_k A (C << (E - e)).
NF_EXPORT const char* nf_matmul_i32(const nf_threads*, const nf_weight*, const int8_t* q, int64_t m, int32_t* acc);

// Convolution of an NCHW float32 image: its rows are (kernel tap, input channel of the group) with the channel running
// fastest; one nf_weight for each of `conv_groups` groups of channels, k = kh * kw * c / conv_groups. Dynamic scale:
// one an image.
struct nf_conv {
  int64_t batch, c, h, w, kh, kw;
  int64_t stride[2], pad_begin[2], pad_end[2], dilation[2];
  int64_t conv_groups;
};
NF_EXPORT const char* nf_conv2d(const nf_threads*, const nf_conv*, const nf_weight* weights, const float* x,
                                int32_t activation_bits, float static_scale, int32_t epilogue, float* y);

// -- codes from layer to layer --------------------------------------------------------------------
// Tensors of u8 codes, [batch][h][w][c]; a code u is worth (u - zero) · scale. Scales are those of the files that plan
// a chain; what stands here is in units of the codes that are written.
//
//   v = float(Σ (x - zero) · W) · scale[o] + bias[o] + float(residual) · residual_scale
//   y = table[clamp(rne(v), low, high)],   or with a function in the place of v: f(v) · gain + offset
//
// every product and sum of floats rounded by itself, to float32. Padding counts as x = zero. `outputs` are those of all
// groups of channels. A pool reads no weights, and its padding counts as nothing.
enum nf_codes_function { NF_CODES_NONE = 0, NF_CODES_HARDSWISH = 1, NF_CODES_SILU = 2 };
struct nf_codes_conv {
  int64_t batch, c, h, w, outputs, kh, kw;
  int64_t stride[2], pad_begin[2], pad_end[2], dilation[2];
  int64_t groups;
  int32_t zero, low, high;
  float residual_scale;
  int32_t function;
  float gain, offset;
};
// Bytes of packed weights, whatever the batch and the size of the image; -1 where an argument is wrong.
NF_EXPORT int64_t nf_codes_bytes(const nf_codes_conv*);
// weights[outputs][tap][channel of the group], each within -128..127, as the kernels of every instruction set read
// them.
NF_EXPORT const char* nf_codes_pack(const nf_threads*, const nf_codes_conv*, const int8_t* weights, const float* scale,
                                    const float* bias, uint8_t* packed);
NF_EXPORT const char* nf_codes_conv2d(const nf_threads*, const nf_codes_conv*, const uint8_t* packed, const uint8_t* x,
                                      const uint8_t* residual, const uint8_t* table, uint8_t* y);
NF_EXPORT const char* nf_codes_max_pool(const nf_threads*, const nf_codes_conv*, const uint8_t* x, uint8_t* y);
// y[b][p][c] = clamp(rne(x[b][c][p] / scale) + zero, 0, top); NaN counts as 0. p: pixels of an image.
NF_EXPORT const char* nf_codes_quantize(const nf_threads*, const float* x, int64_t batch, int64_t c, int64_t pixels,
                                        float scale, int32_t zero, int32_t top, uint8_t* y);
// y[b][c][p] = float(x - zero) · scale
NF_EXPORT const char* nf_codes_dequantize(const nf_threads*, const uint8_t* x, int64_t batch, int64_t c, int64_t pixels,
                                          float scale, int32_t zero, float* y);
// clamp(rne(float(a) · a_scale + float(b) · b_scale + bias), low, high)
NF_EXPORT const char* nf_codes_add(const nf_threads*, const uint8_t* a, const uint8_t* b, int64_t count, float a_scale,
                                   float b_scale, float bias, int32_t low, int32_t high, uint8_t* y);
// y[b][c] = float(Σ_p (x - zero)) · (scale / float(pixels))
NF_EXPORT const char* nf_codes_mean(const nf_threads*, const uint8_t* x, int64_t batch, int64_t c, int64_t pixels,
                                    float scale, int32_t zero, float* y);
// clamp(rne(float(x - zero) · (gate[b][c] · scale) + bias), low, high)
NF_EXPORT const char* nf_codes_gate(const nf_threads*, const uint8_t* x, const float* gate, int64_t batch, int64_t c,
                                    int64_t pixels, float scale, int32_t zero, float bias, int32_t low, int32_t high,
                                    uint8_t* y);
// y[p][j · groups + i] = x[p][first + i · (count / groups) + j], for `count` of c channels
NF_EXPORT const char* nf_codes_take(const nf_threads*, const uint8_t* x, int64_t pixels, int64_t c, int64_t first,
                                    int64_t count, int64_t groups, uint8_t* y);
// Every pixel `tall` by `wide` times; rows: of all images.
NF_EXPORT const char* nf_codes_upsample(const nf_threads*, const uint8_t* x, int64_t rows, int64_t w, int64_t c,
                                        int64_t tall, int64_t wide, uint8_t* y);

// -- normalization --------------------------------------------------------------------------------
enum nf_norm_kind { NF_LAYER = 0, NF_RMS = 1, NF_CRMS = 2, NF_L1 = 3 };
// s = x (+ residual); y = norm(s) * gain + shift over the last axis of d features. CRMS: (Σ s² + (Σ s)²) / (d + 1) +
// eps under the root. L1: centered, divided by scale_const · mean|s - mean| + eps. gain, shift, residual, sum: nullptr
// if absent. sum may be x or residual.
NF_EXPORT const char* nf_norm(const nf_threads*, int32_t kind, const float* x, const float* residual, int64_t rows,
                              int64_t d, const float* gain, const float* shift, float eps, float scale_const,
                              float* sum, float* y);
// The same, quantized by rows as nf_quantize_rows does, without y ever being in memory.
NF_EXPORT const char* nf_norm_quantize(const nf_threads*, int32_t kind, const float* x, const float* residual,
                                       int64_t rows, int64_t d, const float* gain, const float* shift, float eps,
                                       float scale_const, int32_t bits, float* sum, int8_t* q, float* scale);
// Softmax over the last axis: two passes over memory (Dukhan and Ablavatski) for rows of more than 2^18, three over the
// cache for shorter ones. As PyTorch's for every row: NaN, +Inf and a row of -inf give NaN; a finite mask (-1e30, the
// lowest float) is 0 beside other values and uniform alone. A row whose maximum is beyond ±1e5 takes three passes. What
// is more than 87 below the maximum is 0.
NF_EXPORT const char* nf_two_pass_softmax(const nf_threads*, const float* x, int64_t rows, int64_t d, float* y);

// -- attention ------------------------------------------------------------------------------------
// softmax(scale q kᵀ + mask) v in float32. Strides in floats of (batch, head, token); the feature axis (head_dim) is
// contiguous. kv heads may be fewer than q heads (grouped queries). mask: nullptr, or additive with strides (batch,
// head, query), key contiguous. causal: query i sees keys j <= i + (keys - queries). A query that sees nothing gives 0,
// as in PyTorch.
//
// bits 2..8: q and k are quantized by rows (nf_quantize_rows; a row is a head's features of one token) and the scores
// are exact integers times the two scales; v and the weights stay float32. 0: all is float32.
//
// softcap c > 0: scores become c tanh(scores / c) before the mask. window w > 0, with causal: of the keys that a query
// sees it sees the last w. 0: neither.
struct nf_attention {
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  int64_t q_stride[3], k_stride[3], v_stride[3], y_stride[3], mask_stride[3];
  float scale;
  int32_t causal;
  int32_t bits;
  float softcap;
  int64_t window;
};
NF_EXPORT const char* nf_attend(const nf_threads*, const nf_attention*, const float* q, const float* k, const float* v,
                                const float* mask, float* y);

// The same over a cache. Of each row of the batch `tokens` new ones are put behind those of its past, and attend to all
// that are there: `mask` [batch, total] holds 1 for valid tokens, the new ones included. A row whose mask begins with 0
// is padded on the left: its new tokens go to the last slots of `total`, and what its mask hides stays hidden. Any
// other row has as many slots filled as its past has valid tokens.
//
// q, k, v: rows of tokens, heads x head_dim and kv_heads x head_dim floats of each, q_row, k_row and v_row floats
// apart. past and present: [batch, kv_heads, slots, head_dim], with `past` and `present` slots, present = max(past,
// total); they may be the same memory, and then nothing but the new tokens is written. Slots that nothing is in become
// 0. cosines, sines: [positions, pairs], by which queries and keys are rotated at their slot: features i and i + pairs,
// or with `interleaved` 2i and 2i + 1; pairs 0: none. y: [batch, tokens, heads x head_dim]; a token that sees nothing
// gives 0.
struct nf_cache {
  int64_t batch, tokens, heads, kv_heads, head_dim;
  int64_t past, present, total;
  int64_t q_row, k_row, v_row;
  int64_t pairs, positions;
  int64_t window;
  float scale, softcap;
  int32_t interleaved;
};
NF_EXPORT const char* nf_attend_cached(const nf_threads*, const nf_cache*, const float* q, const float* k,
                                       const float* v, const float* past_key, const float* past_value,
                                       const int64_t* mask, const float* cosines, const float* sines,
                                       float* present_key, float* present_value, float* y);

// -- the machine ----------------------------------------------------------------------------------
// Instruction sets, best first, separated by spaces, e.g. "avx512vnni avx2 scalar"; what runs now; and forcing one
// (nullptr: the best).
NF_EXPORT const char* nf_isa_available();
NF_EXPORT const char* nf_isa();
NF_EXPORT const char* nf_force_isa(const char* name);  // an error message if this machine does not have it
// The operators that RegisterCustomOps adds to ONNX Runtime, under all their names, one a line.
NF_EXPORT const char* nf_operators();
// A pool of `count` threads of our own (the caller is one of them), for Python; it lives until the process ends.
NF_EXPORT const nf_threads* nf_pool(int32_t count);
