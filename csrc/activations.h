// Activations, plain and gated, and their gradients; rows are independent.
#pragma once

#include "rows.h"

namespace ptv2::PTV2_LEVEL {

constexpr float kHalfLog2E = 0.721347520444481704f;
constexpr float kDensityAtZero = 0.398942280401432678f;  // 1 / sqrt(2 pi)

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
  x = greater(splat(-256.0f), x);  // of -infinity no fraction could be taken
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

// e^x for x <= 0 with a relative error below 3e-7, also without fused operations; below -88 it is 0 or
// a denormal.
PTV2_INLINE Floats exp_of_negative(Floats x) {
  // ln(2) in two parts, of which a small integer times the first is exact.
  constexpr float high = 0.693359375f, low = -2.12194440e-4f;
  constexpr float coefficients[] = {1.00000012f,  0.999999702f,  0.499988943f,
                                    0.166675746f, 0.0419153832f, 0.0082976548f};
#if defined(PTV2_AVX512)
  x = greater(splat(-128.0f), x);
  const __m512 rounded =
      _mm512_maskz_roundscale_ps(PTV2_ALL_LANES, (__m512)(x * kLog2E), _MM_FROUND_TO_NEAREST_INT);
  const Floats count = (Floats)rounded;
  const Floats power = polynomial(coefficients, (x - count * high) - count * low);
  return (Floats)_mm512_maskz_scalef_ps(PTV2_ALL_LANES, (__m512)power, rounded);
#else
  x = greater(splat(-127 * kLn2), x);
  const Floats shifted = x * kLog2E + 12582912.0f;  // as in power_of_two
  const Floats count = shifted - 12582912.0f;
  const Floats power = polynomial(coefficients, (x - count * high) - count * low);
  return power * (Floats)(((Ints)shifted - (0x4B400000 - 127)) << 23);
#endif
}

// An activation has value(x) and, in one go, both(x).
struct ValueAndSlope {
  Floats value, slope;
};

// GELU of the error function: x Phi(x), where Phi is the normal distribution and phi its density.
// Computed from a = |x|, by Phi(x) = 1 - Phi(-x).
struct Gelu {
  // Where the polynomials end. Beyond it their value there is used, which is at most three times
  // too large, of results below 1e-6.
  static constexpr float kTail = 5.5f;

  // max(x, 0) - a Phi(-a), where Phi(-a) = 2^(q(a) - a^2 log2(e) / 2) and q is smooth: the error of
  // the product is below 2e-8 + its rounding, and relative to it below 2e-3.
  static PTV2_INLINE Floats value(Floats x) {
    const Floats zero{}, a = absolute(x), inner = lesser(a, splat(kTail));
    constexpr float coefficients[] = {-0.999999884f,    -1.15111105f,    0.262189099f,
                                      -0.052651741f,    0.00729458556f,  -0.000318102138f,
                                      -0.000109667762f, 2.29925673e-05f, -1.4456176e-06f};
    const Floats below = power_of_two(polynomial(coefficients, inner) - a * a * kHalfLog2E);
    return greater(x, zero) - inner * below;
  }

  // Phi(-a) = e^(-a^2 / 2) m(a), and Phi(-a) - a phi(a) = e^(-a^2 / 2) (m(a) - a / sqrt(2 pi)) is
  // the slope at -a, and what the slope at a lacks of 1.
  static PTV2_INLINE ValueAndSlope both(Floats x) {
    const Floats zero{}, a = absolute(x), inner = lesser(a, splat(kTail));
    constexpr float coefficients[] = {0.499999964f,     -0.398938949f,   0.249949781f,
                                      -0.132685599f,    0.0616059595f,   -0.0249922766f,
                                      0.00856352528f,   -0.00233655072f, 0.00047207694f,
                                      -6.47131064e-05f, 5.28369982e-06f, -1.91843008e-07f};
    const Floats ratio = polynomial(coefficients, inner);
    const Floats power = power_of_two(a * a * -kHalfLog2E);
    const Floats below = power * (ratio - a * kDensityAtZero);
    return {greater(x, zero) - inner * (power * ratio), x > zero ? 1.0f - below : below};
  }
};

// x sigmoid(v), of a Gate that gives |v| and dv/dx from |x|; v has the sign of x. From
// e = exp(-|v|) come sigmoid(v) and sigmoid(-v) without a difference that cancels.
template <class Gate>
struct Sigmoid {
  static PTV2_INLINE Floats value(Floats x) {
    const Floats power = exp_of_negative(-Gate::magnitude(absolute(x)));
    return x * (x > Floats{} ? splat(1.0f) : power) / (1.0f + power);
  }

  static PTV2_INLINE ValueAndSlope both(Floats x) {
    const Floats a = absolute(x), power = exp_of_negative(-Gate::magnitude(a));
    const Floats above = 1.0f / (1.0f + power), below = power * above;
    const Floats opened = x > Floats{} ? above : below;
    return {x * opened, opened + x * (above * below) * Gate::derivative(a)};
  }
};

struct TanhGate {  // v = 2 sqrt(2 / pi) (x + 0.044715 x^3)
  static constexpr float kScale = 1.59576912160573071f, kCubic = 0.044715f;
  static PTV2_INLINE Floats magnitude(Floats a) { return a * (kScale + a * a * (kScale * kCubic)); }
  static PTV2_INLINE Floats derivative(Floats a) { return kScale + a * a * (3 * kScale * kCubic); }
};

struct PlainGate {  // v = x
  static PTV2_INLINE Floats magnitude(Floats a) { return a; }
  static PTV2_INLINE float derivative(Floats) { return 1.0f; }
};

struct QuickGate {  // v = 1.702 x
  static constexpr float kScale = 1.702f;
  static PTV2_INLINE Floats magnitude(Floats a) { return a * kScale; }
  static PTV2_INLINE float derivative(Floats) { return kScale; }
};

using GeluTanh = Sigmoid<TanhGate>;
using Silu = Sigmoid<PlainGate>;
using QuickGelu = Sigmoid<QuickGate>;

struct Relu {
  static PTV2_INLINE Floats value(Floats x) { return greater(Floats{}, x); }
  static PTV2_INLINE ValueAndSlope both(Floats x) {
    return {value(x), x > Floats{} ? splat(1.0f) : Floats{}};
  }
};

// input + bias from an index on; bias may be null.
template <class Element, class Count>
PTV2_INLINE Floats load_biased(const Element* input, const float* bias, int64_t index,
                               Count count) {
  const Floats x = load_part(input + index, count);
  return bias == nullptr ? x : x + load_part(bias + index, count);
}

template <class Activation, class Element>
inline void activation_rows(const ActivationRows& call, int64_t first, int64_t last) {
  const float* bias = call.bias;
  for (int64_t row = first; row < last; ++row) {
    const auto* input = row_of<Element>(call.input, row, call.columns);
    auto* result = row_of<Element>(call.result, row, call.columns);
    for_columns(call.columns, [&](int64_t column, auto count) {
      const Floats x = load_biased(input, bias, column, count);
      store_part(result + column, Activation::value(x), count);
    });
  }
}

template <class Activation, class Element>
inline void activation_backward_rows(const ActivationRows& call, int64_t first, int64_t last) {
  const float* bias = call.bias;
  for (int64_t row = first; row < last; ++row) {
    const auto* input = row_of<Element>(call.input, row, call.columns);
    const auto* grad_out = row_of<Element>(call.grad_out, row, call.columns);
    auto* result = row_of<Element>(call.result, row, call.columns);
    for_columns(call.columns, [&](int64_t column, auto count) {
      const Floats x = load_biased(input, bias, column, count);
      const Floats grad = load_part(grad_out + column, count) * Activation::both(x).slope;
      store_part(result + column, grad, count);
    });
  }
}

template <class Activation, class Element>
inline void gated_rows(const ActivationRows& call, int64_t first, int64_t last) {
  const float* bias = call.bias;
  const int64_t columns = call.columns;
  const int64_t activated = call.activated_first ? 0 : columns, gate = columns - activated;
  for (int64_t row = first; row < last; ++row) {
    const auto* input = row_of<Element>(call.input, row, 2 * columns);
    auto* result = row_of<Element>(call.result, row, columns);
    for_columns(columns, [&](int64_t column, auto count) {
      const Floats x = load_biased(input, bias, activated + column, count);
      const Floats factor = load_biased(input, bias, gate + column, count);
      store_part(result + column, Activation::value(x) * factor, count);
    });
  }
}

template <class Activation, class Element>
inline void gated_backward_rows(const ActivationRows& call, int64_t first, int64_t last) {
  const float* bias = call.bias;
  const int64_t columns = call.columns;
  const int64_t activated = call.activated_first ? 0 : columns, gate = columns - activated;
  for (int64_t row = first; row < last; ++row) {
    const auto* input = row_of<Element>(call.input, row, 2 * columns);
    const auto* grad_out = row_of<Element>(call.grad_out, row, columns);
    auto* result = row_of<Element>(call.result, row, 2 * columns);
    for_columns(columns, [&](int64_t column, auto count) {
      const auto [value, slope] =
          Activation::both(load_biased(input, bias, activated + column, count));
      const Floats factor = load_biased(input, bias, gate + column, count);
      const Floats grad = load_part(grad_out + column, count);
      store_part(result + activated + column, grad * factor * slope, count);
      store_part(result + gate + column, grad * value, count);
    });
  }
}

template <class Activation, class Element>
constexpr ActivationKernels activation_table() {
  return {activation_rows<Activation, Element>, activation_backward_rows<Activation, Element>,
          gated_rows<Activation, Element>, gated_backward_rows<Activation, Element>};
}

}  // namespace ptv2::PTV2_LEVEL
