// exp, tanh, erf and the activations on vectors of floats. Polynomials fitted for this file (weighted least squares,
// reweighted towards the minimax); NaN in gives NaN out.
#pragma once
#if NF_BUILT
namespace nf::NF_ARCH {

// exp(r), r = x - n ln 2, |r| <= ln 2 / 2.
inline F32 exp_of_rest(F32 x, F32 n) {
  F32 r = fma(n, F32::set(-0.693359375f), x);
  r = fma(n, F32::set(2.12194440e-4f), r);
  F32 p = F32::set(0.001381446490995586f);
  p = fma(p, r, F32::set(0.008368780836462975f));
  p = fma(p, r, F32::set(0.04166839271783829f));
  p = fma(p, r, F32::set(0.1666651964187622f));
  p = fma(p, r, F32::set(0.4999999403953552f));
  return fma(p * r, r, r) + F32::set(1.f);
}

// exp(x) = 2^n exp(r); error below 2 ulp; 0 below -104, infinity above 88.73; subnormal results are right.
inline F32 exp(F32 x) {
  x = max(F32::set(-104.f), min(F32::set(89.f), x));  // the second operand is what NaN takes
  const F32 n = round(x * F32::set(1.44269504f));
  const F32 p = exp_of_rest(x, n);
  // 2^n in two factors: n goes from -150 to 128.
  const F32 half = round(n * F32::set(0.5f));
  const I32 bias = I32::set(127);
  const F32 a = float_of(shift_left<23>(to_int(half) + bias));
  const F32 b = float_of(shift_left<23>(to_int(n - half) + bias));
  const F32 y = p * a * b;
  return select(ordered(x), y, x);
}

// 1 / (1 + exp(-x)), and 0 below -87, so that no number on the way is subnormal: those take a hundred times as long.
inline F32 sigmoid(F32 x) {
  const F32 a = max(F32::set(-87.f), min(F32::set(87.f), F32::set(0.f) - x));
  const F32 n = round(a * F32::set(1.44269504f));
  const F32 scale = float_of(shift_left<23>(to_int(n) + I32::set(127)));
  const F32 s = F32::set(1.f) / fma(exp_of_rest(a, n), scale, F32::set(1.f));
  return select(x < F32::set(-87.f), F32::set(0.f), s);
}

inline F32 tanh(F32 x) {
  const F32 a = abs(x), z = x * x;
  F32 p = F32::set(-0.005660780239850283f);
  p = fma(p, z, F32::set(0.020601999014616013f));
  p = fma(p, z, F32::set(-0.05372922867536545f));
  p = fma(p, z, F32::set(0.13331328332424164f));
  p = fma(p, z, F32::set(-0.33333277702331543f));
  const F32 small = fma(p * z, x, x);
  const F32 large = F32::set(1.f) - F32::set(2.f) / (exp(a + a) + F32::set(1.f));
  return select(a < F32::set(0.6f), small, copysign(large, x));
}

// x P(x²) / Q(x²) on |x| <= 3.9, where erf is 1 to the last bit; relative error below 4e-7.
inline F32 erf(F32 x) {
  const F32 c = max(F32::set(-3.9f), min(F32::set(3.9f), x));
  const F32 z = c * c;
  F32 p = F32::set(2.066472006845288e-06f);
  p = fma(p, z, F32::set(0.00028506270609796047f));
  p = fma(p, z, F32::set(0.003738363040611148f));
  p = fma(p, z, F32::set(0.05266813561320305f));
  p = fma(p, z, F32::set(0.189667209982872f));
  p = fma(p, z, F32::set(1.1283791065216064f));
  F32 q = F32::set(3.827003456535749e-05f);
  q = fma(q, z, F32::set(0.0011573805240914226f));
  q = fma(q, z, F32::set(0.014914310537278652f));
  q = fma(q, z, F32::set(0.11381911486387253f));
  q = fma(q, z, F32::set(0.5014209747314453f));
  q = fma(q, z, F32::set(1.f));
  return max(F32::set(-1.f), min(F32::set(1.f), c * p / q));
}

inline F32 relu(F32 x) { return max(F32::set(0.f), x); }
inline F32 gelu(F32 x) { return F32::set(0.5f) * x * (F32::set(1.f) + erf(x * F32::set(0.70710678118654752f))); }
// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2/π) (x + 0.044715 x³)
inline F32 gelu_tanh(F32 x) {
  const F32 u2 = F32::set(1.5957691216057308f) * x * fma(F32::set(0.044715f), x * x, F32::set(1.f));
  return x * sigmoid(u2);
}
inline F32 silu(F32 x) { return x * sigmoid(x); }

// Codes: clamp(rne(x * inverse), ±limit); a NaN product gives 0.
inline I32 to_code(F32 x, F32 inverse, F32 limit) {
  const F32 v = x * inverse;
  const F32 c = max(F32::set(0.f) - limit, min(limit, v));
  return to_int(select(ordered(v), c, F32::set(0.f)));
}

}  // namespace nf::NF_ARCH
#endif
