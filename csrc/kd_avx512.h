// The vector type of kd_kernel.h in AVX-512: 16 lanes. Included like kd_kernel.h, before it, by
// kd_avx512.cpp and, with MINIPLM_KD_BF16, by kd_avx512_bf16.cpp.

struct Wide {
  static constexpr int64_t kLanes = 16;
  __m512 value;

  Wide() = default;
  explicit Wide(__m512 x) : value(x) {}
  explicit Wide(float x) : value(_mm512_set1_ps(x)) {}

  static Wide Load(const float* x) { return Wide(_mm512_loadu_ps(x)); }
  static Wide Load(const Bf16* x) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return Wide(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
  }
  void Store(float* x) const { _mm512_storeu_ps(x, value); }
  void Store(Bf16* x) const {  // round to nearest even
#ifdef MINIPLM_KD_BF16
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m256i rounded =
        _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, half), 16));
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), rounded);
  }
};

inline Wide operator+(Wide a, Wide b) { return Wide(_mm512_add_ps(a.value, b.value)); }
inline Wide operator-(Wide a, Wide b) { return Wide(_mm512_sub_ps(a.value, b.value)); }
inline Wide operator*(Wide a, Wide b) { return Wide(_mm512_mul_ps(a.value, b.value)); }
inline Wide operator/(Wide a, Wide b) { return Wide(_mm512_div_ps(a.value, b.value)); }
inline Wide Fma(Wide a, Wide b, Wide c) { return Wide(_mm512_fmadd_ps(a.value, b.value, c.value)); }
inline Wide Abs(Wide x) { return Wide(_mm512_abs_ps(x.value)); }
inline Wide Max(Wide a, Wide b) { return Wide(_mm512_max_ps(a.value, b.value)); }
inline __mmask16 Greater(Wide a, Wide b) {
  return _mm512_cmp_ps_mask(a.value, b.value, _CMP_GT_OQ);
}
inline __mmask16 Equal(Wide a, Wide b) { return _mm512_cmp_ps_mask(a.value, b.value, _CMP_EQ_OQ); }
inline bool Any(__mmask16 mask) { return mask != 0; }
inline Wide Select(__mmask16 mask, Wide yes, Wide no) {
  return Wide(_mm512_mask_blend_ps(mask, no.value, yes.value));
}
inline void KeepInRegisters(Wide*, Wide*) {}  // 32 registers are enough
inline float HorizontalMax(Wide x) { return _mm512_reduce_max_ps(x.value); }
inline float HorizontalSum(Wide x) { return _mm512_reduce_add_ps(x.value); }
inline Wide ExponentOf(Wide x) {
  return Wide(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.value), 23)));
}
inline void SplitFloat(Wide x, Wide* exponent, Wide* mantissa) {
  const __m512i bits = _mm512_castps_si512(x.value);
  const __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kSqrtHalfBits)), 23);
  *exponent = Wide(_mm512_cvtepi32_ps(n));
  *mantissa = Wide(_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23))));
}
