// The passes over a row of logits (kd_rows.h), compiled once for every instruction set.
//
// The including file defines the vector types `Wide` and `Single` (one lane, for the ragged end of
// a row) and includes this in an anonymous namespace under its own target options, so that no
// instruction of AVX-512 ends up in what an older machine runs. Hence no include guard, and no
// includes.
//
// A row is read tile by tile: the tile's maxima, then its sums, from the L1 cache; the sums of all
// tiles are kept in double and rescaled when a maximum grows. The gradient is a second sweep over
// the row, from L2 or L3. Formulas: kernels/reference.py; names: kernels/record.py, but logarithms
// are powers of two until a record is written: e^x = 2^(x log2 e), and exp2 is the cheaper one.

constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kNoColumn = -1e30f;  // record.py: NO_COLUMN
// Of both matrices in fp32: a quarter of a 32 KB L1 cache. A lane adds 128 numbers in fp32; a lone
// one fewer, since no other lanes' errors cancel its own.
constexpr int64_t kTile = Wide::kLanes > 1 ? 128 * Wide::kLanes : 32;

// --- elementary functions -----------------------------------------------------------------------

// x = n + f with |f| <= 1/2 as 2^n and 2^f - 1; 2^n is 0 from n = -127 down, NaN stays NaN.
template <class V>
inline void SplitExp2(V x, V* power, V* fraction) {
  const V magic(12582912.0f + 127.0f);  // the sum's low bits are n + 127: an exponent in the making
  const V bounded = Max(V(-127.0f), x);
  const V shifted = bounded + magic;
  const V f = bounded - (shifted - magic);
  // Minimax on [-1/2, 1/2], without a constant term: 9e-8 of 2^f.
  V q(1.3264728e-3f);
  q = Fma(q, f, V(9.6715130e-3f));
  q = Fma(q, f, V(5.5507336e-2f));
  q = Fma(q, f, V(2.4022242e-1f));
  q = Fma(q, f, V(6.9314700e-1f));
  *power = ExponentOf(shifted);
  *fraction = q * f;
}

template <class V>
inline V Exp2(V x) {
  V power, fraction;
  SplitExp2(x, &power, &fraction);
  return Fma(power, fraction, power);
}

// 2^x - 1, x <= 0; accurate near 0.
template <class V>
inline V Exp2Minus1(V x) {
  V power, fraction;
  SplitExp2(x, &power, &fraction);
  return Fma(power, fraction, power - V(1.0f));
}

// ln(1 + y), -1 < y <= 0; accurate near 0. The polynomial is that of logf in Cephes.
template <class V>
inline V Log1p(V y) {
  V exponent, mantissa;  // 1 + y = 2^exponent mantissa, mantissa in [sqrt(1/2), sqrt(2))
  SplitFloat(V(1.0f) + y, &exponent, &mantissa);
  const V f = Select(Equal(exponent, V(0.0f)), y, mantissa - V(1.0f));
  V p(7.0376836292e-2f);
  p = Fma(p, f, V(-1.1514610310e-1f));
  p = Fma(p, f, V(1.1676998740e-1f));
  p = Fma(p, f, V(-1.2420140846e-1f));
  p = Fma(p, f, V(1.4249322787e-1f));
  p = Fma(p, f, V(-1.6668057665e-1f));
  p = Fma(p, f, V(2.0000714765e-1f));
  p = Fma(p, f, V(-2.4999993993e-1f));
  p = Fma(p, f, V(3.3333331174e-1f));
  const V square = f * f;
  return Fma(exponent, V(static_cast<float>(kLn2)), Fma(square, Fma(p, f, V(-0.5f)), f));
}

// e^x out of e^(scale x), x <= 0: at the temperatures 1, 2 and 4 without another exponential.
class Unscaled {
 public:
  explicit Unscaled(float scale)
      : squarings_(scale == 1.0f    ? 0
                   : scale == 0.5f  ? 1
                   : scale == 0.25f ? 2
                                    : -1) {}

  template <class V>
  V operator()(V scaled, V x) const {
    if (squarings_ < 0) return Exp2(x * V(kLog2E));
    for (int i = 0; i < squarings_; ++i) scaled = scaled * scaled;
    return scaled;
  }

 private:
  int squarings_;  // -1: an exponential of its own
};

// Calls part<Wide>(begin, middle) and part<Single>(middle, end).
template <class Part>
inline void WideThenSingle(int64_t begin, int64_t end, const Part& part) {
  const int64_t middle = begin + (end - begin) / Wide::kLanes * Wide::kLanes;
  if (begin < middle) part(Wide(), begin, middle);
  if (middle < end) part(Single(), middle, end);
}

// --- statistics ---------------------------------------------------------------------------------

constexpr bool IsSquare(Form form) {
  return form == Form::kMseLogits || form == Form::kMseCentered || form == Form::kMseLogProbs;
}

// One softmax over the tiles so far.
template <class T>
struct Softmax {
  const T* x;
  float scale;
  float max = kNoColumn;
  int64_t arg = 0;
  double sum = 0, sum1 = 0;

  // Makes a tile's maximum the maximum, if it is higher; returns by how much u fell, in bits.
  double Raise(int64_t begin, int64_t end) {
    float high = kNoColumn;
    WideThenSingle(begin, end, [&](auto lanes, int64_t from, int64_t to) {
      using V = decltype(lanes);
      V highest(kNoColumn);
      for (int64_t i = from; i < to; i += V::kLanes) highest = Max(highest, V::Load(x + i));
      high = Max(Single(high), Single(HorizontalMax(highest))).value;
    });
    if (!(high > max)) return 0;
    const double fall = (static_cast<double>(max) - high) * kLog2E;
    max = high;
    arg = ColumnOf(high, begin, end);
    sum *= std::exp2(fall * scale);
    sum1 *= std::exp2(fall);
    return fall * scale;
  }

 private:
  // The first column that has the value, which is there.
  int64_t ColumnOf(float value, int64_t i, int64_t end) const {
    while (i + Wide::kLanes <= end && !Any(Equal(Wide::Load(x + i), Wide(value)))) {
      i += Wide::kLanes;
    }
    while (i + 1 < end && Single::Load(x + i).value != value) ++i;
    return i;
  }
};

// What student and teacher say together; sums of logarithms in bits.
struct Crossed {
  double cross = 0, entropy = 0;
  double count = 0, mean = 0, square = 0;

  // The maxima rose, u and v fell; the sums are those before.
  void Fall(Form form, double u, double v, double sum_s, double sum_t) {
    entropy = (entropy + sum_t * v) * std::exp2(v);
    if (form == Form::kForward) cross = (cross + sum_t * (v - u)) * std::exp2(v);
    if (form == Form::kReverse) cross = (cross + sum_s * (u - v)) * std::exp2(u);
    if (count > 0) mean += u - v;
  }

  // n more differences: sums of their deviations from `near` and of the squares of these.
  void AddSquares(double n, double near, double deviations, double squares) {
    const double part = deviations / n, step = near + part - mean;
    square += squares - n * part * part + step * step * count * n / (count + n);
    mean += step * n / (count + n);
    count += n;
  }
};

// The sum of e^(scale (x - max)) of a tile's columns.
template <class V, class T>
inline double SumOfExponentials(int64_t begin, int64_t end, const Softmax<T>& of, float scale) {
  const V max(of.max), factor(scale * kLog2E);
  V sum(0.0f);
  for (int64_t i = begin; i < end; i += V::kLanes) {
    sum = sum + Exp2((V::Load(of.x + i) - max) * factor);
  }
  return HorizontalSum(sum);
}

template <class V, class T>
inline void AddSums(int64_t begin, int64_t end, Softmax<T>* of) {
  const double sum = SumOfExponentials<V>(begin, end, *of, of->scale);
  of->sum += sum;
  of->sum1 += of->scale == 1.0f ? sum : SumOfExponentials<V>(begin, end, *of, 1.0f);
}

// Of both, and what they say together. The loop has no more sums than there are registers to keep
// them in: those at scale 1 are in it where they are squares (temperature 2), else in one of their
// own.
template <class V, Form kForm, bool kSquare, class S, class T>
inline void AddSums(int64_t begin, int64_t end, Softmax<S>* student, Softmax<T>* teacher,
                    Crossed* both) {
  const V max_s(student->max), factor_s(student->scale * kLog2E);
  const V max_t(teacher->max), factor_t(teacher->scale * kLog2E);
  // Deviations from about the mean, so that their squares cancel no digits.
  float near = static_cast<float>(both->mean);
  if (IsSquare(kForm) && both->count == 0) {
    const float u = (Single::Load(student->x + begin).value - student->max) * student->scale;
    const float v = (Single::Load(teacher->x + begin).value - teacher->max) * teacher->scale;
    near = (u - v) * kLog2E;
  }
  V sum_s(0.0f), sum_s1(0.0f), sum_t(0.0f), sum_t1(0.0f), entropy(0.0f), cross(0.0f);
  V deviations(0.0f), squares(0.0f);
  for (int64_t i = begin; i < end; i += V::kLanes) {
    const V u = (V::Load(student->x + i) - max_s) * factor_s;
    const V v = (V::Load(teacher->x + i) - max_t) * factor_t;
    const V e_s = Exp2(u), e_t = Exp2(v);
    sum_s = sum_s + e_s;
    sum_t = sum_t + e_t;
    // Bounded: a probability of 0 times its logarithm of -inf is 0.
    const V bounded = Max(V(-127.0f), v);
    entropy = Fma(e_t, bounded, entropy);
    if constexpr (kForm == Form::kForward) {
      cross = Fma(e_t, bounded - Max(V(kNoColumn), u), cross);
    } else if constexpr (kForm == Form::kReverse) {
      cross = Fma(e_s, Max(V(-127.0f), u) - Max(V(kNoColumn), v), cross);
    } else if constexpr (IsSquare(kForm)) {
      const V d = u - v - V(near);
      deviations = deviations + d;
      squares = Fma(d, d, squares);
    }
    if constexpr (kSquare) {
      sum_s1 = Fma(e_s, e_s, sum_s1);
      sum_t1 = Fma(e_t, e_t, sum_t1);
      KeepInRegisters(&sum_s1, &sum_t1);
    }
    KeepInRegisters(&sum_s, &sum_t);
    KeepInRegisters(&entropy, &cross);
  }
  const double total_s = HorizontalSum(sum_s), total_t = HorizontalSum(sum_t);
  student->sum += total_s;
  teacher->sum += total_t;
  both->entropy += HorizontalSum(entropy);
  both->cross += HorizontalSum(cross);
  if constexpr (IsSquare(kForm)) {
    const double n = static_cast<double>(end - begin);
    both->AddSquares(n, near, HorizontalSum(deviations), HorizontalSum(squares));
  }
  if constexpr (kSquare) {
    student->sum1 += HorizontalSum(sum_s1);
    teacher->sum1 += HorizontalSum(sum_t1);
  } else {
    const bool same_s = student->scale == 1.0f, same_t = teacher->scale == 1.0f;
    student->sum1 += same_s ? total_s : SumOfExponentials<V>(begin, end, *student, 1.0f);
    teacher->sum1 += same_t ? total_t : SumOfExponentials<V>(begin, end, *teacher, 1.0f);
  }
}

template <class S>
void StudentStats(const Row& row, Record* record) {
  Softmax<S> student{static_cast<const S*>(row.student), row.student_scale};
  for (int64_t begin = 0; begin < row.valid; begin += kTile) {
    const int64_t end = std::min(row.valid, begin + kTile);
    student.Raise(begin, end);
    WideThenSingle(begin, end, [&](auto lanes, int64_t from, int64_t to) {
      AddSums<decltype(lanes)>(from, to, &student);
    });
  }
  *record = {};
  record->max_s = student.max;
  record->sum_s = static_cast<float>(student.sum);
  record->sum_s1 = static_cast<float>(student.sum1);
  record->gold_s = row.label >= 0 ? Single::Load(student.x + row.label).value : 0.0f;
  record->arg_s = row.valid > 0 ? static_cast<float>(row.first + student.arg) : 0.0f;
}

template <Form kForm, class S, class T>
void BothStats(const Row& row, Record* record) {
  Softmax<S> student{static_cast<const S*>(row.student), row.student_scale};
  Softmax<T> teacher{static_cast<const T*>(row.teacher), row.teacher_scale};
  Crossed both;
  const bool square = row.student_scale == 0.5f && row.teacher_scale == 0.5f;
  for (int64_t begin = 0; begin < row.valid; begin += kTile) {
    const int64_t end = std::min(row.valid, begin + kTile);
    const double sum_s = student.sum, sum_t = teacher.sum;
    const double u = student.Raise(begin, end), v = teacher.Raise(begin, end);
    if (u != 0 || v != 0) both.Fall(kForm, u, v, sum_s, sum_t);
    WideThenSingle(begin, end, [&](auto lanes, int64_t from, int64_t to) {
      using V = decltype(lanes);
      if (square) {
        AddSums<V, kForm, true>(from, to, &student, &teacher, &both);
      } else {
        AddSums<V, kForm, false>(from, to, &student, &teacher, &both);
      }
    });
  }
  const bool owns = row.label >= 0;
  const double cross = both.cross * kLn2;
  *record = {
      student.max,
      static_cast<float>(student.sum),
      static_cast<float>(student.sum1),
      owns ? Single::Load(student.x + row.label).value : 0.0f,
      row.valid > 0 ? static_cast<float>(row.first + student.arg) : 0.0f,
      teacher.max,
      static_cast<float>(teacher.sum),
      static_cast<float>(teacher.sum1),
      owns ? Single::Load(teacher.x + row.label).value : 0.0f,
      row.valid > 0 ? static_cast<float>(row.first + teacher.arg) : 0.0f,
      kForm == Form::kForward ? static_cast<float>(cross) : 0.0f,
      kForm == Form::kReverse ? static_cast<float>(cross) : 0.0f,
      static_cast<float>(both.entropy * kLn2),
      static_cast<float>(row.valid),
      static_cast<float>(both.mean * kLn2),
      static_cast<float>(both.square * kLn2 * kLn2),
  };
}

// --- normalised probabilities -------------------------------------------------------------------

constexpr bool IsBracket(Form form) {
  return form == Form::kReverse || form == Form::kJsd || form == Form::kSkewKl ||
         form == Form::kSkewRkl || form == Form::kTvd || form == Form::kBrier;
}

// The logits of columns relative to the maxima over the whole vocabulary, scaled, in bits.
template <class V>
struct Relative {
  V raw;  // of the student, neither scaled nor in bits
  V u, v;

  // v - u; an infinity less an infinity is no number.
  V Difference() const { return Max(V(kNoColumn), v) - Max(V(kNoColumn), u); }
};

// Constants of a row of which the record is known.
struct Known {
  float max_s, factor_s, inverse_s, max_t, factor_t, inverse_t;
  float log_ratio;  // log2(sum_s / sum_t): log2 q - log2 p = v - u + log_ratio

  Known(const Row& row, const Record& record)
      : max_s(record.max_s),
        factor_s(row.student_scale * kLog2E),
        inverse_s(1.0f / record.sum_s),
        max_t(record.max_t),
        factor_t(row.teacher_scale * kLog2E),
        inverse_t(1.0f / record.sum_t),
        log_ratio(static_cast<float>(std::log2(static_cast<double>(record.sum_s)) -
                                     std::log2(static_cast<double>(record.sum_t)))) {}

  template <class V>
  Relative<V> To(V s, V t) const {
    const V raw = s - V(max_s);
    return {raw, raw * V(factor_s), (t - V(max_t)) * V(factor_t)};
  }
};

// m = b x + (1 - b) y of two probabilities, delta = log2 y - log2 x.
template <class V>
struct Mixture {
  V log_x, log_y;  // ln(m / x), ln(m / y)
  V excess;        // x / m - 1
};

// With e = 2^-|delta| - 1 and c the weight of the smaller of x and y: m = larger (1 + c e).
template <class V>
inline Mixture<V> Mix(V delta, float weight_of_x) {
  const V zero(0.0f), ln2(static_cast<float>(kLn2));
  const auto x_is_smaller = Greater(delta, zero);
  const V e = Exp2Minus1(zero - Abs(delta));
  const V y = Select(x_is_smaller, V(weight_of_x), V(1.0f - weight_of_x)) * e;
  const V log = Log1p(y);
  return {Fma(Max(zero, delta), ln2, log), Fma(Max(zero, zero - delta), ln2, log),
          (Select(x_is_smaller, e, zero) - y) / (V(1.0f) + y)};
}

// h of g_i = factor p_i (h_i - sum_j p_j h_j), and the column's part of the divergence.
template <class V>
struct Bracket {
  V h, part;
};

// delta = log2 q - log2 p.
template <Form kForm, class V>
inline Bracket<V> BracketOf(V p, V q, V delta, float beta) {
  const V zero(0.0f);
  if constexpr (kForm == Form::kReverse) {
    return {delta * V(static_cast<float>(-kLn2)), zero};
  } else if constexpr (kForm == Form::kTvd) {
    const V sign = Select(Greater(delta, zero), V(-1.0f), V(1.0f));
    return {Select(Equal(delta, zero), zero, sign), V(0.5f) * Abs(p - q)};
  } else if constexpr (kForm == Form::kBrier) {
    return {p - q, (p - q) * (p - q)};
  } else if constexpr (kForm == Form::kJsd) {
    const Mixture<V> m = Mix(delta, 1.0f - beta);
    const V part = Fma(V(beta) * q, m.log_y, V(1.0f - beta) * p * m.log_x);
    return {zero - m.log_x, zero - part};
  } else if constexpr (kForm == Form::kSkewKl) {
    const Mixture<V> m = Mix(zero - delta, beta);
    return {zero - m.excess, zero - q * m.log_x};
  } else {
    static_assert(kForm == Form::kSkewRkl, "a form with a bracket");
    const Mixture<V> m = Mix(delta, beta);
    return {zero - Fma(V(beta), m.excess, m.log_x), zero - p * m.log_x};
  }
}

inline float BracketFactor(Form form, float beta) {
  if (form == Form::kJsd || form == Form::kSkewKl) return 1.0f - beta;
  return form == Form::kTvd ? 0.5f : form == Form::kBrier ? 2.0f : 1.0f;
}

template <Form kForm, class S, class T>
void InnerSums(const Row& row, const Record& record, Inner* inner) {
  const Known known(row, record);
  const S* s = static_cast<const S*>(row.student);
  const T* t = static_cast<const T*>(row.teacher);
  double value = 0, bracket = 0;
  for (int64_t begin = 0; begin < row.valid; begin += kTile) {
    const int64_t end = std::min(row.valid, begin + kTile);
    WideThenSingle(begin, end, [&](auto lanes, int64_t from, int64_t to) {
      using V = decltype(lanes);
      V values(0.0f), brackets(0.0f);
      for (int64_t i = from; i < to; i += V::kLanes) {
        const Relative<V> at = known.To(V::Load(s + i), V::Load(t + i));
        const V p = Exp2(at.u) * V(known.inverse_s), q = Exp2(at.v) * V(known.inverse_t);
        const V delta = at.Difference() + V(known.log_ratio);
        const Bracket<V> column = BracketOf<kForm>(p, q, delta, row.beta);
        values = values + column.part;
        brackets = Fma(p, column.h, brackets);
      }
      value += HorizontalSum(values);
      bracket += HorizontalSum(brackets);
    });
  }
  *inner = {static_cast<float>(value), static_cast<float>(bracket)};
}

// --- gradients ----------------------------------------------------------------------------------

// dL/ds of a column but for the label's -ce_weight.
template <Form kForm>
class Gradient {
 public:
  Gradient(const Row& row, const Record& record, const Inner& inner)
      : known_(row, record), unscaled_(row.student_scale), beta_(row.beta) {
    const double sum_s = record.sum_s, sum_t = record.sum_t, sum_s1 = record.sum_s1;
    const double weight = static_cast<double>(row.kd_weight) * row.student_scale;
    const double lse = record.max_s + std::log(sum_s1);
    double ce = row.ce_weight * (1 + 2 * row.z_loss * lse) / sum_s1;
    if constexpr (kForm == Form::kForward) {
      double student = weight / sum_s;
      if (row.student_scale == 1.0f) {  // temperature 1: one softmax serves both
        student += ce;
        ce = 0;
      }
      student_ = static_cast<float>(student);
      teacher_ = static_cast<float>(weight / sum_t);
    } else if constexpr (IsBracket(kForm)) {
      const double reverse = record.reverse / sum_s - known_.log_ratio * kLn2;
      student_ = static_cast<float>(weight * BracketFactor(kForm, row.beta) / sum_s);
      center_ = kForm == Form::kReverse ? static_cast<float>(reverse) : inner.bracket;
    } else if constexpr (IsSquare(kForm)) {
      const double each = 2 * weight / record.columns, center = Center(row, record);
      const double total = record.columns * (record.mean_d - center);
      teacher_ = static_cast<float>(each * kLn2);
      center_ = static_cast<float>(center / kLn2);
      student_ = static_cast<float>(each * total / sum_s);
    }
    ce_ = static_cast<float>(ce);
  }

  template <class V>
  V operator()(V s, V t) const {
    if constexpr (kForm == Form::kNone) {
      return Exp2((s - V(known_.max_s)) * V(kLog2E)) * V(ce_);
    } else {
      const Relative<V> at = known_.To(s, t);
      V e_s, g;
      if constexpr (kForm == Form::kForward) {
        e_s = Exp2(at.u);
        g = e_s * V(student_) - Exp2(at.v) * V(teacher_);
      } else if constexpr (IsBracket(kForm)) {
        e_s = Exp2(at.u);
        const V p = e_s * V(known_.inverse_s), q = Exp2(at.v) * V(known_.inverse_t);
        const V delta = at.Difference() + V(known_.log_ratio);
        g = e_s * V(student_) * (BracketOf<kForm>(p, q, delta, beta_).h - V(center_));
      } else {
        g = (at.u - at.v - V(center_)) * V(teacher_);
        if (kForm != Form::kMseLogProbs && ce_ == 0) return g;
        e_s = Exp2(at.u);
        if constexpr (kForm == Form::kMseLogProbs) g = g - e_s * V(student_);
      }
      return ce_ == 0 ? g : Fma(unscaled_(e_s, at.raw), V(ce_), g);
    }
  }

 private:
  // record.py: square_center, in nats.
  static double Center(const Row& row, const Record& record) {
    if constexpr (kForm == Form::kMseCentered) return record.mean_d;
    if constexpr (kForm == Form::kMseLogProbs) {
      return std::log(static_cast<double>(record.sum_s)) -
             std::log(static_cast<double>(record.sum_t));
    }
    return static_cast<double>(record.max_t) * row.teacher_scale -
           static_cast<double>(record.max_s) * row.student_scale;
  }

  Known known_;
  Unscaled unscaled_;
  float beta_;
  float ce_ = 0;       // factor of e^(s - max_s)
  float student_ = 0;  // factor of e^u
  float teacher_ = 0;  // factor of e^v, or of u - v
  float center_ = 0;   // what is subtracted from h, or from u - v in bits
};

template <Form kForm, class S, class T>
void WriteGradient(const Row& row, const Record& record, const Inner& inner) {
  const Gradient<kForm> gradient(row, record, inner);
  S* s = static_cast<S*>(row.student);
  // Without a teacher, the student is read twice and used once.
  const T* t =
      kForm == Form::kNone ? reinterpret_cast<const T*>(s) : static_cast<const T*>(row.teacher);
  // The label's before its logit is overwritten.
  Single gold(0.0f);
  if (row.label >= 0) {
    gold =
        gradient(Single::Load(s + row.label), Single::Load(t + row.label)) - Single(row.ce_weight);
  }
  WideThenSingle(0, row.valid, [&](auto lanes, int64_t from, int64_t to) {
    using V = decltype(lanes);
    for (int64_t i = from; i < to; i += V::kLanes) {
      gradient(V::Load(s + i), V::Load(t + i)).Store(s + i);
    }
  });
  if (row.label >= 0) gold.Store(s + row.label);
  std::memset(s + row.valid, 0, sizeof(S) * static_cast<size_t>(row.width - row.valid));
}

template <Form kForm, class S, class T>
void WriteAnyGradient(const Row& row, const Record& record, const Inner& inner) {
  if (row.kd_weight == 0) return WriteGradient<Form::kNone, S, S>(row, record, inner);
  WriteGradient<kForm, S, T>(row, record, inner);
}

// --- the table ----------------------------------------------------------------------------------

template <Form kForm, class S, class T>
Passes PassesOf() {
  if constexpr (kForm == Form::kNone) {
    return {StudentStats<S>, nullptr, WriteGradient<Form::kNone, S, S>};
  } else if constexpr (IsBracket(kForm) && kForm != Form::kReverse) {
    return {BothStats<Form::kNone, S, T>, InnerSums<kForm, S, T>, WriteAnyGradient<kForm, S, T>};
  } else if constexpr (IsSquare(kForm)) {
    return {BothStats<Form::kMseLogits, S, T>, nullptr, WriteAnyGradient<kForm, S, T>};
  } else {
    return {BothStats<kForm, S, T>, nullptr, WriteAnyGradient<kForm, S, T>};
  }
}

template <class S, class T>
Passes PassesOf(Form form) {
  switch (form) {
    case Form::kNone:
      return PassesOf<Form::kNone, S, T>();
    case Form::kForward:
      return PassesOf<Form::kForward, S, T>();
    case Form::kReverse:
      return PassesOf<Form::kReverse, S, T>();
    case Form::kJsd:
      return PassesOf<Form::kJsd, S, T>();
    case Form::kSkewKl:
      return PassesOf<Form::kSkewKl, S, T>();
    case Form::kSkewRkl:
      return PassesOf<Form::kSkewRkl, S, T>();
    case Form::kTvd:
      return PassesOf<Form::kTvd, S, T>();
    case Form::kMseLogits:
      return PassesOf<Form::kMseLogits, S, T>();
    case Form::kMseCentered:
      return PassesOf<Form::kMseCentered, S, T>();
    case Form::kMseLogProbs:
      return PassesOf<Form::kMseLogProbs, S, T>();
    case Form::kBrier:
      return PassesOf<Form::kBrier, S, T>();
  }
  return {};
}

inline Passes PassesOf(Form form, bool student_is_bf16, bool teacher_is_bf16) {
  if (student_is_bf16) {
    return teacher_is_bf16 ? PassesOf<Bf16, Bf16>(form) : PassesOf<Bf16, float>(form);
  }
  return teacher_is_bf16 ? PassesOf<float, Bf16>(form) : PassesOf<float, float>(form);
}
