// The vector type of kd_kernel.h in AVX2 and FMA: 8 lanes. Included like kd_kernel.h, before it.

struct Wide {
  static constexpr int64_t kLanes = 8;
  __m256 value;

  Wide() = default;
  explicit Wide(__m256 x) : value(x) {}
  explicit Wide(float x) : value(_mm256_set1_ps(x)) {}

  static Wide Load(const float* x) { return Wide(_mm256_loadu_ps(x)); }
  static Wide Load(const Bf16* x) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return Wide(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
  }
  void Store(float* x) const { _mm256_storeu_ps(x, value); }
  void Store(Bf16* x) const {  // round to nearest even
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
};

inline Wide operator+(Wide a, Wide b) { return Wide(_mm256_add_ps(a.value, b.value)); }
inline Wide operator-(Wide a, Wide b) { return Wide(_mm256_sub_ps(a.value, b.value)); }
inline Wide operator*(Wide a, Wide b) { return Wide(_mm256_mul_ps(a.value, b.value)); }
inline Wide operator/(Wide a, Wide b) { return Wide(_mm256_div_ps(a.value, b.value)); }
inline Wide Fma(Wide a, Wide b, Wide c) { return Wide(_mm256_fmadd_ps(a.value, b.value, c.value)); }
inline Wide Abs(Wide x) { return Wide(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.value)); }
inline Wide Max(Wide a, Wide b) { return Wide(_mm256_max_ps(a.value, b.value)); }
inline Wide Greater(Wide a, Wide b) { return Wide(_mm256_cmp_ps(a.value, b.value, _CMP_GT_OQ)); }
inline Wide Equal(Wide a, Wide b) { return Wide(_mm256_cmp_ps(a.value, b.value, _CMP_EQ_OQ)); }
inline bool Any(Wide mask) { return _mm256_movemask_ps(mask.value) != 0; }
inline Wide Select(Wide mask, Wide yes, Wide no) {
  return Wide(_mm256_blendv_ps(no.value, yes.value, mask.value));
}
// No instruction: tells the compiler to spill constants, which a memory operand replaces, and not
// sums, which would go through memory in every iteration.
inline void KeepInRegisters(Wide* a, Wide* b) { asm("" : "+x"(a->value), "+x"(b->value)); }
inline float HorizontalMax(Wide x) {
  const __m128 four =
      _mm_max_ps(_mm256_castps256_ps128(x.value), _mm256_extractf128_ps(x.value, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float HorizontalSum(Wide x) {
  const __m128 four =
      _mm_add_ps(_mm256_castps256_ps128(x.value), _mm256_extractf128_ps(x.value, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Wide ExponentOf(Wide x) {
  return Wide(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.value), 23)));
}
inline void SplitFloat(Wide x, Wide* exponent, Wide* mantissa) {
  const __m256i bits = _mm256_castps_si256(x.value);
  const __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kSqrtHalfBits)), 23);
  *exponent = Wide(_mm256_cvtepi32_ps(n));
  *mantissa = Wide(_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23))));
}
