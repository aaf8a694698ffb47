// The sum of all ranks' parts: in rank order, in float32 for 16-bit floats.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace mlxtp {

// What is added. Signed integers are added as unsigned ones, and wrap.
enum class Element { boolean, uint8, uint16, uint32, uint64, f16, bf16, f32, f64 };

// 16-bit floats as they lie. The conversions have no branches: compilers vectorize
// them.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};
// MLX stores a bool in a byte; their sum is their "or", as numpy's.
struct Truth {
  uint8_t value;
};

constexpr uint32_t kHalfToFloat = 112u << 23;  // the exponents' biases differ by 112

inline float widen(Half half) {
  const auto sign = uint32_t(half.bits & 0x8000u) << 16;
  const auto rest = uint32_t(half.bits & 0x7fffu) << 13;
  const auto subnormal = std::bit_cast<uint32_t>(float(int32_t(rest >> 13)) * 0x1p-24f);
  const uint32_t normal = rest + kHalfToFloat;
  const uint32_t not_finite = normal + kHalfToFloat;
  uint32_t bits = rest < (0x0400u << 13) ? subnormal : normal;
  bits = rest < (0x7c00u << 13) ? bits : not_finite;
  return std::bit_cast<float>(bits | sign);
}

inline float widen(Brain brain) {
  return std::bit_cast<float>(uint32_t(brain.bits) << 16);
}

// Rounds to nearest, ties to even; of a NaN the upper bits stay.
inline void narrow(float wide, Half& half) {
  const auto bits = std::bit_cast<uint32_t>(wide);
  const uint32_t size = bits & 0x7fffffffu;
  // The last bit of a float between 0.5 and 1 is that of a subnormal half.
  const float shifted = std::bit_cast<float>(size) + 0.5f;
  const auto subnormal = std::bit_cast<uint32_t>(shifted) - 0x3f000000u;
  const uint32_t rebased = size - kHalfToFloat;
  const uint32_t normal = (rebased + 0x0fffu + ((rebased >> 13) & 1u)) >> 13;
  const uint32_t nan = 0x7c00u | ((size >> 13) & 0x03ffu);
  uint32_t rounded = size < 0x38800000u ? subnormal : normal;
  rounded = size < 0x47800000u ? rounded : 0x7c00u;
  rounded = size <= 0x7f800000u ? rounded : nan;
  half.bits = uint16_t(rounded | ((bits >> 16) & 0x8000u));
}

// Rounds to nearest, ties to even; every NaN becomes the quiet one of its sign.
inline void narrow(float wide, Brain& brain) {
  const auto bits = std::bit_cast<uint32_t>(wide);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = 0x7fc0u | ((bits >> 16) & 0x8000u);
  brain.bits = uint16_t((bits & 0x7fffffffu) <= 0x7f800000u ? rounded : nan);
}

inline uint8_t widen(Truth truth) { return truth.value; }
inline void narrow(uint8_t any, Truth& truth) { truth.value = any != 0; }

template <typename T>
T widen(T value) {
  return value;
}
template <typename T>
void narrow(T value, T& out) {
  out = value;
}

// Adds `count` elements of each part. `out` may be the memory of one of the parts.
template <typename T>
void add(const std::vector<const char*>& parts, void* out, size_t count) {
  using Wide = decltype(widen(T{}));
  constexpr size_t kBlock = 1024;
  Wide sums[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t length = std::min(kBlock, count - start);
    const T* first = reinterpret_cast<const T*>(parts[0]) + start;
    for (size_t i = 0; i < length; ++i) {
      sums[i] = widen(first[i]);
    }
    for (size_t rank = 1; rank < parts.size(); ++rank) {
      const T* part = reinterpret_cast<const T*>(parts[rank]) + start;
      for (size_t i = 0; i < length; ++i) {
        sums[i] = Wide(sums[i] + widen(part[i]));
      }
    }
    T* total = reinterpret_cast<T*>(out) + start;
    for (size_t i = 0; i < length; ++i) {
      narrow(sums[i], total[i]);
    }
  }
}

inline void add(Element element, const std::vector<const char*>& parts, void* out,
                size_t count) {
  switch (element) {
    case Element::boolean:
      return add<Truth>(parts, out, count);
    case Element::uint8:
      return add<uint8_t>(parts, out, count);
    case Element::uint16:
      return add<uint16_t>(parts, out, count);
    case Element::uint32:
      return add<uint32_t>(parts, out, count);
    case Element::uint64:
      return add<uint64_t>(parts, out, count);
    case Element::f16:
      return add<Half>(parts, out, count);
    case Element::bf16:
      return add<Brain>(parts, out, count);
    case Element::f32:
      return add<float>(parts, out, count);
    case Element::f64:
      return add<double>(parts, out, count);
  }
  throw std::logic_error("no such element");
}

inline size_t size_of(Element element) {
  switch (element) {
    case Element::boolean:
    case Element::uint8:
      return 1;
    case Element::uint16:
    case Element::f16:
    case Element::bf16:
      return 2;
    case Element::uint32:
    case Element::f32:
      return 4;
    case Element::uint64:
    case Element::f64:
      return 8;
  }
  throw std::logic_error("no such element");
}

}  // namespace mlxtp
