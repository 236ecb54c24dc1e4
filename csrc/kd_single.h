// One lane of the vector types of kd_kernel.h: the scalar variant, and the ragged end of a row in
// the others. Included like kd_kernel.h, before it.

constexpr int32_t kSqrtHalfBits = 0x3f3504f3;  // of sqrt(1/2) as a float

struct Bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Single {
  static constexpr int64_t kLanes = 1;
  float value;

  Single() = default;
  explicit Single(float x) : value(x) {}

  static Single Load(const float* x) { return Single(*x); }
  static Single Load(const Bf16* x) {
    return Single(BitCast<float>(static_cast<uint32_t>(x->bits) << 16));
  }
  void Store(float* x) const { *x = value; }
  void Store(Bf16* x) const {  // round to nearest even
    const uint32_t bits = BitCast<uint32_t>(value);
    x->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

inline Single operator+(Single a, Single b) { return Single(a.value + b.value); }
inline Single operator-(Single a, Single b) { return Single(a.value - b.value); }
inline Single operator*(Single a, Single b) { return Single(a.value * b.value); }
inline Single operator/(Single a, Single b) { return Single(a.value / b.value); }
inline Single Fma(Single a, Single b, Single c) { return Single(a.value * b.value + c.value); }
inline Single Abs(Single x) { return Single(std::fabs(x.value)); }
// The second where either is no number: as the x86 instruction.
inline Single Max(Single a, Single b) { return a.value > b.value ? a : b; }
inline bool Greater(Single a, Single b) { return a.value > b.value; }
inline bool Equal(Single a, Single b) { return a.value == b.value; }
inline bool Any(bool mask) { return mask; }
inline Single Select(bool mask, Single yes, Single no) { return mask ? yes : no; }
inline void KeepInRegisters(Single*, Single*) {}
inline float HorizontalMax(Single x) { return x.value; }
inline float HorizontalSum(Single x) { return x.value; }

// The float whose exponent field is the low 8 bits of x's.
inline Single ExponentOf(Single x) {
  return Single(BitCast<float>(BitCast<uint32_t>(x.value) << 23));
}

// x = 2^exponent mantissa, mantissa in [sqrt(1/2), sqrt(2)); x > 0 and normal.
inline void SplitFloat(Single x, Single* exponent, Single* mantissa) {
  const int32_t bits = BitCast<int32_t>(x.value);
  const int32_t n = (bits - kSqrtHalfBits) >> 23;
  *exponent = Single(static_cast<float>(n));
  *mantissa = Single(BitCast<float>(bits - (n << 23)));
}
