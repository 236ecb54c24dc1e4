// The passes over a row of logits for a teacher of whom some tokens are known. Included like
// kd_kernel.h, after it. Formulas and names: kernels/sparse_loss.py and kernels/sparse_record.py.
//
// The columns of the support are hidden while the others are summed (a logit of -inf counts for
// nothing), so that 1 - p_S is a sum. The gradient of the others is written over all columns; those
// of the support and the label's are then replaced by values made from gathered logits in fp32.

// The entries whose columns this shard has, side by side; how many.
template <class S>
int64_t GatherSupport(const SparseRow& of, const S* x) {
  int64_t count = 0;
  for (int64_t k = 0; k < of.entries; ++k) {
    const int64_t column = of.ids[k] - of.row.first;
    if (of.ids[k] < 0 || column < 0 || column >= of.row.valid) continue;
    of.columns[count] = static_cast<int32_t>(column);
    of.logits[count] = Single::Load(x + column).value;
    of.own_weights[count] = of.weights[k];
    ++count;
  }
  return count;
}

// One softmax over `columns` logits.
template <class T>
Softmax<T> SoftmaxOf(const T* x, int64_t columns, float scale) {
  Softmax<T> of{x, scale};
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t end = std::min(columns, begin + kTile);
    of.Raise(begin, end);
    WideThenSingle(begin, end, [&](auto lanes, int64_t from, int64_t to) {
      AddSums<decltype(lanes)>(from, to, &of);
    });
  }
  return of;
}

// part(lanes, begin, end) of all columns, summed tile by tile.
template <class Part>
double SumOfTiles(int64_t columns, const Part& part) {
  double sum = 0;
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    WideThenSingle(begin, std::min(columns, begin + kTile),
                   [&](auto lanes, int64_t from, int64_t to) { sum += part(lanes, from, to); });
  }
  return sum;
}

// The fields of the columns off the support; the others' logits are hidden.
template <class S>
void OffStats(const SparseRow& of, const S* x, int64_t hidden, SparseRecord* record) {
  const int64_t valid = of.row.valid, columns = valid - hidden;
  const Softmax<S> off = SoftmaxOf(x, valid, of.row.student_scale);
  record->off_max = off.max;
  record->off_sum = static_cast<float>(off.sum);
  record->off_sum1 = static_cast<float>(off.sum1);
  record->off_arg = valid > 0 ? static_cast<float>(of.row.first + off.arg) : 0.0f;
  record->off_columns = static_cast<float>(columns);
  if (of.form == SparseForm::kSquare) {
    record->off_square =
        static_cast<float>(SumOfTiles(valid, [&](auto lanes, int64_t from, int64_t to) {
          return SumOfExponentials<decltype(lanes)>(from, to, off, 2 * off.scale);
        }));
  } else if (of.form == SparseForm::kUniform && columns > 0) {
    const double sum = SumOfTiles(valid, [&](auto lanes, int64_t from, int64_t to) {
      using V = decltype(lanes);
      V part(0.0f);
      for (int64_t i = from; i < to; i += V::kLanes) {
        const V logit = V::Load(x + i);
        part = part + Select(Greater(logit, V(-INFINITY)), logit - V(off.max), V(0.0f));
      }
      return static_cast<double>(HorizontalSum(part));
    });
    record->off_mean = static_cast<float>(sum * off.scale / static_cast<double>(columns));
  }
}

// The fields of `count` gathered entries.
inline void OnStats(const SparseRow& of, int64_t count, SparseRecord* record) {
  const Softmax<float> on =
      SoftmaxOf(static_cast<const float*>(of.logits), count, of.row.student_scale);
  double weight = 0, cross = 0, overlap = 0, square = 0;
  double weighing = 0, mean_d = 0, square_d = 0;
  int32_t arg = -1;
  for (int64_t k = 0; k < count; ++k) {
    const double w = of.own_weights[k];
    const double u = (static_cast<double>(of.logits[k]) - on.max) * on.scale;
    if (of.logits[k] == on.max && (arg < 0 || of.columns[k] < arg)) arg = of.columns[k];
    weight += w;
    if (of.form == SparseForm::kSquare) {
      const double e = std::exp(u);
      overlap += w * e;
      square += e * e;
    } else if (w > 0 && of.form == SparseForm::kSquareLogits) {
      const double step = u - std::log(w) - mean_d;
      weighing += 1;
      mean_d += step / weighing;
      square_d += step * step * (1 - 1 / weighing);
    } else if (w > 0) {
      cross += w * u;
    }
  }
  record->on_max = on.max;
  record->on_sum = static_cast<float>(on.sum);
  record->on_sum1 = static_cast<float>(on.sum1);
  record->on_arg = arg < 0 ? 0.0f : static_cast<float>(of.row.first + arg);
  record->on_square = static_cast<float>(square);
  record->on_weight = static_cast<float>(weight);
  record->on_cross = static_cast<float>(cross);
  record->on_overlap = static_cast<float>(overlap);
  record->on_count = static_cast<float>(weighing);
  record->on_mean_d = static_cast<float>(mean_d);
  record->on_square_d = static_cast<float>(square_d);
}

template <class S>
void SparseStats(const SparseRow& of, SparseRecord* record) {
  S* x = static_cast<S*>(of.row.student);
  *record = {};
  if (of.row.label >= 0) record->gold = Single::Load(x + of.row.label).value;
  const int64_t count = GatherSupport(of, x);
  for (int64_t k = 0; k < count; ++k) Single(-INFINITY).Store(x + of.columns[k]);
  OffStats(of, static_cast<const S*>(x), count, record);
  for (int64_t k = 0; k < count; ++k) Single(of.logits[k]).Store(x + of.columns[k]);
  OnStats(of, count, record);
}

// kernels/sparse_record.py: coefficients. dL/ds but for the label's -ce_weight.
class SparseGradient {
 public:
  SparseGradient(const SparseRow& of, const SparseRecord& r)
      : square_logits_(of.form == SparseForm::kSquareLogits),
        scale_(of.row.student_scale),
        off_max_(r.off_max),
        on_max_(r.on_max),
        mean_d_(r.on_mean_d),
        unscaled_(of.row.student_scale) {
    const double top = std::max(r.off_max, r.on_max);
    const double raw_off = std::exp(r.off_max - top), raw_on = std::exp(r.on_max - top);
    double p_off = std::exp((r.off_max - top) * scale_), p_on = std::exp((r.on_max - top) * scale_);
    const double sum = r.off_sum * p_off + r.on_sum * p_on;
    const double sum1 = r.off_sum1 * raw_off + r.on_sum1 * raw_on;
    p_off /= sum;  // of the largest logits
    p_on /= sum;
    const double lse = std::log(sum1) + top;
    const double ce = of.row.ce_weight * (1 + 2 * of.row.z_loss * lse) / sum1;
    const double kd = static_cast<double>(of.row.kd_weight) * scale_;
    const double tail = r.off_columns > 0 ? of.tail : 0;
    const double mass = r.on_weight + (of.form == SparseForm::kSupport ? 0 : tail);
    Factors off = {ce * raw_off, 0, 0, 0}, on = {ce * raw_on, 0, 0, 0};
    switch (of.form) {
      case SparseForm::kSupport:
      case SparseForm::kResidual:
      case SparseForm::kUniform:
        off.exp = kd * mass * p_off;
        on.exp = kd * mass * p_on;
        weight_ = static_cast<float>(-kd);
        if (tail > 0 && of.form == SparseForm::kResidual) off.exp -= kd * tail / r.off_sum;
        if (tail > 0 && of.form == SparseForm::kUniform) off.constant = -kd * tail / r.off_columns;
        break;
      case SparseForm::kOnSupport:
        if (r.on_sum > 0) on.exp = kd * r.on_weight / r.on_sum;
        weight_ = static_cast<float>(-kd);
        break;
      case SparseForm::kSquare: {
        const double squares =
            r.off_square * p_off * p_off + r.on_square * p_on * p_on;  // sum p^2
        const double mean = squares - r.on_overlap * p_on;
        off.exp = -2 * kd * mean * p_off;
        off.square = 2 * kd * p_off * p_off;
        on.exp = -2 * kd * mean * p_on;
        on.square = 2 * kd * p_on * p_on;
        overlap_ = static_cast<float>(-2 * kd * p_on);
        break;
      }
      case SparseForm::kSquareLogits:
        error_ = r.on_count > 0 ? 2 * kd / r.on_count : 0;
        break;
    }
    off_ = Single4(off);
    on_ = Single4(on);
  }

  // Of columns off the support.
  template <class V>
  V Off(V x) const {
    return Of(off_, x - V(off_max_), V(off_.exp), V(off_.constant));
  }

  // Of entries with these weights.
  template <class V>
  V On(V x, V w) const {
    return Of(on_, x - V(on_max_), Fma(w, V(overlap_), V(on_.exp)), w * V(weight_));
  }

  // What an entry has besides.
  float Error(float x, float w) const {
    if (!square_logits_ || !(w > 0)) return 0;
    const double u = (static_cast<double>(x) - on_max_) * scale_;
    return static_cast<float>(error_ * (u - std::log(static_cast<double>(w)) - mean_d_));
  }

 private:
  template <class Number>
  struct FactorsOf {
    Number raw, exp, square, constant;  // of e^(x - max), e^u, e^2u and 1
  };
  using Factors = FactorsOf<double>;

  static FactorsOf<float> Single4(const Factors& of) {
    return {static_cast<float>(of.raw), static_cast<float>(of.exp), static_cast<float>(of.square),
            static_cast<float>(of.constant)};
  }

  // What nearly cancels, c p - w, is added first.
  template <class V>
  V Of(const FactorsOf<float>& factors, V raw, V exp, V constant) const {
    const V e = Exp2(raw * V(scale_ * kLog2E));
    const V g = Fma(Fma(e, V(factors.square), exp), e, constant);
    return factors.raw == 0 ? g : Fma(unscaled_(e, raw), V(factors.raw), g);
  }

  bool square_logits_;
  float scale_, off_max_, on_max_, mean_d_;
  Unscaled unscaled_;
  FactorsOf<float> off_, on_;
  float weight_ = 0, overlap_ = 0;  // of w and w e^u
  double error_ = 0;                // of d - mean_d
};

template <class S>
void WriteSparseGradient(const SparseRow& of, const SparseRecord& record) {
  const SparseGradient gradient(of, record);
  S* x = static_cast<S*>(of.row.student);
  const int64_t count = GatherSupport(of, x), label = of.row.label;
  // In the place of the gathered logits.
  WideThenSingle(0, count, [&](auto lanes, int64_t from, int64_t to) {
    using V = decltype(lanes);
    for (int64_t k = from; k < to; k += V::kLanes) {
      const V logit = V::Load(of.logits + k), w = V::Load(of.own_weights + k);
      V g = gradient.On(logit, w);
      if (of.form == SparseForm::kSquareLogits) {
        for (int64_t i = k; i < k + V::kLanes; ++i) {
          of.own_weights[i] = gradient.Error(of.logits[i], of.own_weights[i]);
        }
        g = g + V::Load(of.own_weights + k);
      }
      g.Store(of.logits + k);
    }
  });
  Single gold(0.0f);
  if (label >= 0) gold = gradient.Off(Single::Load(x + label)) - Single(of.row.ce_weight);
  WideThenSingle(0, of.row.valid, [&](auto lanes, int64_t from, int64_t to) {
    using V = decltype(lanes);
    for (int64_t i = from; i < to; i += V::kLanes) gradient.Off(V::Load(x + i)).Store(x + i);
  });
  if (label >= 0) gold.Store(x + label);
  for (int64_t k = 0; k < count; ++k) {
    const float ce = of.columns[k] == label ? of.row.ce_weight : 0.0f;
    Single(of.logits[k] - ce).Store(x + of.columns[k]);
  }
  std::memset(x + of.row.valid, 0, sizeof(S) * static_cast<size_t>(of.row.width - of.row.valid));
}

inline SparsePasses SparsePassesOf(bool student_is_bf16) {
  if (student_is_bf16) return {SparseStats<Bf16>, WriteSparseGradient<Bf16>};
  return {SparseStats<float>, WriteSparseGradient<float>};
}
