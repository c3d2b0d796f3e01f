// GELU of the error function and its gradient: x Phi(x) and Phi(x) + x phi(x), where Phi is the
// normal distribution and phi its density. Both are computed from a = |x|, by Phi(x) = 1 - Phi(-x).
#pragma once

#include "rows.h"

namespace ptv2::PTV2_LEVEL {

constexpr float kHalfLog2E = 0.721347520444481704f;
constexpr float kDensityAtZero = 0.398942280401432678f;  // 1 / sqrt(2 pi)

// Where the polynomials end. Beyond it their value there is used, which is at most three times
// too large, of results below 1e-6.
constexpr float kTail = 5.5f;

PTV2_INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7FFFFFFF); }

template <int count>
PTV2_INLINE Floats polynomial(const float (&coefficients)[count], Floats x) {
  Floats sum = splat(coefficients[count - 1]);
#pragma GCC unroll 16
  for (int i = count - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^x for x <= 0 with a relative error of 1e-7; below -127 exactly 0. Shorter than exp, whose
// results are summed.
PTV2_INLINE Floats power_of_two(Floats x) {
  constexpr float coefficients[] = {1.00000007f,   0.693146967f,   0.240221197f,
                                    0.0555071327f, 0.00967554133f, 0.0013276472f};
#if defined(PTV2_AVX512)
  const __m512 rounded =
      _mm512_maskz_roundscale_ps(PTV2_ALL_LANES, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Floats power = polynomial(coefficients, x - (Floats)rounded);
  return (Floats)_mm512_maskz_scalef_ps(PTV2_ALL_LANES, (__m512)power, rounded);
#else
  x = greater(splat(-127.0f), x);
  const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: its low mantissa bits hold round(x)
  const Floats power = polynomial(coefficients, x - (shifted - 12582912.0f));
  // round(x) = -127 makes the exponent field 0, so that the factor is 0 and not a denormal.
  return power * (Floats)(((Ints)shifted - (0x4B400000 - 127)) << 23);
#endif
}

// max(x, 0) - a Phi(-a), where Phi(-a) = 2^(q(a) - a^2 log2(e) / 2) and q is smooth: the error of
// the product is below 2e-8 + its rounding, and relative to it below 2e-3.
PTV2_INLINE Floats gelu(Floats x) {
  const Floats zero{}, tail = splat(kTail), a = absolute(x);
  const Floats inner = lesser(a, tail);
  constexpr float coefficients[] = {-0.999999884f,    -1.15111105f,    0.262189099f,
                                    -0.052651741f,    0.00729458556f,  -0.000318102138f,
                                    -0.000109667762f, 2.29925673e-05f, -1.4456176e-06f};
  const Floats below = power_of_two(polynomial(coefficients, inner) - a * a * kHalfLog2E);
  return greater(x, zero) - inner * below;
}

// Phi(-a) - a phi(a) = e^(-a^2 / 2) (m(a) - a / sqrt(2 pi)) is the gradient at -a, and what the
// gradient at a lacks of 1.
PTV2_INLINE Floats gelu_gradient(Floats x) {
  const Floats zero{}, tail = splat(kTail), a = absolute(x);
  const Floats inner = lesser(a, tail);
  constexpr float coefficients[] = {0.499999964f,     -0.398938949f,   0.249949781f,
                                    -0.132685599f,    0.0616059595f,   -0.0249922766f,
                                    0.00856352528f,   -0.00233655072f, 0.00047207694f,
                                    -6.47131064e-05f, 5.28369982e-06f, -1.91843008e-07f};
  const Floats ratio = polynomial(coefficients, inner) - a * kDensityAtZero;
  const Floats below = power_of_two(a * a * -kHalfLog2E) * ratio;
  return x > zero ? 1.0f - below : below;
}

template <class Element>
inline void gelu_rows(const GeluRows& call, int64_t first, int64_t last) {
  const auto* input = static_cast<const Element*>(call.input);
  auto* result = static_cast<Element*>(call.result);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * call.columns;
    for_columns(call.columns, [&](int64_t column, auto count) {
      Floats x = load_part(input + start + column, count);
      if (call.bias != nullptr) x += load_part(call.bias + column, count);
      store_part(result + start + column, gelu(x), count);
    });
  }
}

template <class Element>
inline void gelu_backward_rows(const GeluRows& call, int64_t first, int64_t last) {
  const auto* input = static_cast<const Element*>(call.input);
  const auto* grad_out = static_cast<const Element*>(call.grad_out);
  auto* result = static_cast<Element*>(call.result);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * call.columns;
    for_columns(call.columns, [&](int64_t column, auto count) {
      Floats x = load_part(input + start + column, count);
      if (call.bias != nullptr) x += load_part(call.bias + column, count);
      const Floats grad = load_part(grad_out + start + column, count) * gelu_gradient(x);
      store_part(result + start + column, grad, count);
    });
  }
}

}  // namespace ptv2::PTV2_LEVEL
