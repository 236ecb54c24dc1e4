#include "select.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "threads.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MINIPLM_AVX2 __attribute__((target("avx2")))
#else
#define MINIPLM_AVX2
#endif
#define MINIPLM_INLINE inline __attribute__((always_inline))

namespace miniplm {
namespace {

constexpr int64_t kChunkRows = int64_t{1} << 18;  // what a thread takes at a time: 1 MiB a column
constexpr int64_t kChunksAhead = 8;               // read from the disk while others are computed
constexpr int64_t kFetchRows = int64_t{1} << 15;  // 128 KiB a column, Linux's read-ahead
constexpr int kWordRows = 64;                     // rows of a word of the mask
constexpr int kFewRows = 16;                      // of a word: worth computing one by one
constexpr double kNone = std::numeric_limits<double>::infinity();

MINIPLM_INLINE uint64_t Image(double key) {
  uint64_t bits;
  key += 0.0;  // -0.0 becomes 0.0
  std::memcpy(&bits, &key, sizeof(bits));
  return bits ^ ((bits >> 63) != 0 ? ~uint64_t{0} : uint64_t{1} << 63);
}

MINIPLM_INLINE int32_t LoadWeight(const unsigned char* weights, int64_t row) {
  if (weights == nullptr) return 1;
  int32_t value;
  std::memcpy(&value, weights + row * 4, sizeof(value));
  return value;
}

// Whether any row has a sum that is not finite or negative, or a negative count.
MINIPLM_INLINE bool AnyBad(const float* sum, const int32_t* tokens, int n) {
  int bad = 0;
  for (int i = 0; i < n; ++i) {
    bad |= static_cast<int>(!(sum[i] >= 0.0f)) | static_cast<int>(!(sum[i] <= FLT_MAX));
    bad |= static_cast<int>(tokens[i] < 0);
  }
  return bad != 0;
}

MINIPLM_INLINE void NegativeLogLikelihood(const float* sum, const int32_t* tokens, bool per_token,
                                          int n, double* out) {
  if (per_token) {
    for (int i = 0; i < n; ++i) {
      out[i] = static_cast<double>(sum[i]) / static_cast<double>(std::max(tokens[i], 1));
    }
  } else {
    for (int i = 0; i < n; ++i) out[i] = static_cast<double>(sum[i]);
  }
}

// A draw in [0, 1) for each id: splitmix64, as selection/split.py uniform_keys.
MINIPLM_INLINE void RandomKeys(const KeyRows& rows, int64_t at, int n, double* keys) {
  for (int i = 0; i < n; ++i) {
    const int64_t id = rows.ids != nullptr ? rows.ids[at + i] : rows.first_id + at + i;
    uint64_t state = static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u + rows.random_state;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    state ^= state >> 31;
    keys[i] = static_cast<double>(static_cast<int64_t>(state >> 11)) * 0x1p-53;
  }
}

// Whether a row in [at, at + n) has scores that no selection may use, read by the rule or not.
MINIPLM_INLINE bool AnyBadScore(const KeyRows& rows, int64_t at, int n) {
  const bool teacher = rows.teacher_sum != nullptr, reference = rows.reference_sum != nullptr;
  bool bad = false;
  if (teacher) bad |= AnyBad(rows.teacher_sum + at, rows.teacher_tokens + at, n);
  if (reference) bad |= AnyBad(rows.reference_sum + at, rows.reference_tokens + at, n);
  if (teacher && reference) {
    int differ = 0;
    for (int i = 0; i < n; ++i) {
      differ |= rows.teacher_tokens[at + i] ^ rows.reference_tokens[at + i];
    }
    bad |= differ != 0;
  }
  return bad;
}

// Keys of rows [at, at + n); true if one of the rows may not be used.
MINIPLM_INLINE bool FillKeys(const KeyRows& rows, int64_t at, int n, double* keys) {
  bool bad = AnyBadScore(rows, at, n);
  double other[kWordRows];
  const bool teacher = rows.rule == KeyRule::kDifference || rows.rule == KeyRule::kTeacher;
  const bool reference = rows.rule == KeyRule::kDifference || rows.rule == KeyRule::kReference;
  if (teacher) {
    NegativeLogLikelihood(rows.teacher_sum + at, rows.teacher_tokens + at, rows.per_token, n,
                          reference ? other : keys);
  }
  if (reference) {
    NegativeLogLikelihood(rows.reference_sum + at, rows.reference_tokens + at, rows.per_token, n,
                          keys);
  }
  switch (rows.rule) {
    case KeyRule::kDifference:
      for (int i = 0; i < n; ++i) keys[i] = keys[i] - other[i];
      break;
    case KeyRule::kTeacher:
      for (int i = 0; i < n; ++i) keys[i] = 0.0 - keys[i];
      break;
    case KeyRule::kReference:
      break;
    case KeyRule::kRandom:
      RandomKeys(rows, at, n, keys);
      break;
    case KeyRule::kGiven:
      for (int i = 0; i < n; ++i) {
        keys[i] = rows.keys[at + i];
        bad |= !(std::fabs(keys[i]) <= DBL_MAX);
      }
      break;
  }
  return bad;
}

MINIPLM_INLINE uint64_t EligibleBits(const KeyRows& rows, int64_t at, int n) {
  uint64_t bits = n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  if (rows.eligible_tokens == nullptr) return bits;
  for (int i = 0; i < n; ++i) {
    if (rows.eligible_tokens[at + i] < rows.least_tokens) bits &= ~(uint64_t{1} << i);
  }
  return bits;
}

// Which rows of a word need their exact key, told by float32 arithmetic: the key of a row is
// (a - b) / n of float32 sums a, b >= 0. Its float32 image has an error of at most 3 units of 2^-24
// relative to the true quotient, and the float64 key one of 2^-52 (a + b) / n absolute, which is
// below 2^-28 where the sums are below 2^23. Both are well inside the margin.
struct Filter {
  static constexpr uint32_t kLargestSum = 0x4B000000;  // bits of 2^23 in float32

  Filter(double lowest, double highest) {
    const double largest = std::max(std::fabs(lowest), std::fabs(highest));
    usable = largest < 1e30;
    const double margin = usable ? std::ldexp(largest, -20) + std::ldexp(1.0, -26) : 0.0;
    // Rounding these to float32 moves them by less than a sixteenth of the margin.
    low = usable ? static_cast<float>(lowest - margin) : 0.0f;
    high = usable ? static_cast<float>(highest + margin) : 0.0f;
  }

  // How far below the image of a key the key may be.
  static double Slack(float image) {
    return std::ldexp(std::fabs(static_cast<double>(image)), -20) + std::ldexp(1.0, -26);
  }

  bool usable;
  float low, high;
};

struct FilteredWord {
  uint64_t above;   // certainly
  uint64_t unsure;  // near or inside the bracket
  float lowest;     // image of a key that is certainly above
  bool odd;         // maybe a score that may not be used, or one too large for the filter
};

// Lowest key among the rows with a bit.
double LowestOf(const double* keys, uint64_t bits) {
  double lowest = kNone;
  for (; bits != 0; bits &= bits - 1) lowest = std::min(lowest, keys[__builtin_ctzll(bits)]);
  return lowest;
}

WordBits CompareScalar(const double* keys, int n, double low, double high) {
  WordBits bits = {0, 0, kNone};
  for (int i = 0; i < n; ++i) {
    bits.above |= static_cast<uint64_t>(keys[i] > high) << i;
    bits.inside |= static_cast<uint64_t>(keys[i] >= low && keys[i] <= high) << i;
    if (keys[i] > high) bits.lowest = std::min(bits.lowest, keys[i]);
  }
  return bits;
}

#if defined(__x86_64__) && defined(__GNUC__)
MINIPLM_AVX2 WordBits CompareAvx2(const double* keys, double low, double high) {
  WordBits bits = {0, 0, kNone};
  const __m256d lows = _mm256_set1_pd(low), highs = _mm256_set1_pd(high);
  __m256d lowest = _mm256_set1_pd(kNone);
  for (int i = 0; i < 64; i += 4) {
    const __m256d key = _mm256_loadu_pd(keys + i);
    const __m256d above = _mm256_cmp_pd(key, highs, _CMP_GT_OQ);
    const __m256d from = _mm256_cmp_pd(key, lows, _CMP_GE_OQ);
    bits.above |= static_cast<uint64_t>(_mm256_movemask_pd(above)) << i;
    bits.inside |= static_cast<uint64_t>(_mm256_movemask_pd(_mm256_andnot_pd(above, from))) << i;
    lowest = _mm256_min_pd(lowest, _mm256_blendv_pd(lowest, key, above));
  }
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, lowest);
  bits.lowest = std::min(std::min(lanes[0], lanes[1]), std::min(lanes[2], lanes[3]));
  return bits;
}

MINIPLM_AVX2 bool FillKeysAvx2(const KeyRows& rows, int64_t at, int n, double* keys) {
  return FillKeys(rows, at, n, keys);
}

MINIPLM_AVX2 __m256i Load8(const void* column, int64_t at) {
  return _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const char*>(column) + 4 * at));
}

// A float32 image of 64 keys against a bracket widened by `Filter`'s margin.
MINIPLM_AVX2 FilteredWord FilterAvx2(const KeyRows& rows, int64_t at, const Filter& filter) {
  const bool teacher = rows.teacher_sum != nullptr, reference = rows.reference_sum != nullptr;
  const bool minus_teacher = rows.rule != KeyRule::kReference;
  const bool plus_reference = rows.rule != KeyRule::kTeacher;
  const float* const sums[2] = {teacher ? rows.teacher_sum : rows.reference_sum,
                                reference ? rows.reference_sum : rows.teacher_sum};
  const int32_t* const counts[2] = {teacher ? rows.teacher_tokens : rows.reference_tokens,
                                    reference ? rows.reference_tokens : rows.teacher_tokens};
  const __m256 lows = _mm256_set1_ps(filter.low), highs = _mm256_set1_ps(filter.high);
  const __m256i one = _mm256_set1_epi32(1);
  const __m256 none = _mm256_set1_ps(std::numeric_limits<float>::infinity());
  FilteredWord word = {0, 0, 0.0f, false};
  __m256 lowest = none;
  __m256i largest = _mm256_setzero_si256();  // bits of sums, which order as unsigned integers
  __m256i wrong = _mm256_setzero_si256();    // its sign: a negative count, or unequal ones
  for (int i = 0; i < kWordRows; i += 8) {
    const __m256i first = Load8(sums[0], at + i), second = Load8(sums[1], at + i);
    const __m256i count = Load8(counts[0], at + i), other = Load8(counts[1], at + i);
    largest = _mm256_max_epu32(largest, _mm256_max_epu32(first, second));
    const __m256i same = _mm256_cmpeq_epi32(count, other);
    const __m256i differ = _mm256_andnot_si256(same, _mm256_set1_epi32(-1));
    wrong = _mm256_or_si256(wrong, _mm256_or_si256(count, differ));
    __m256 key = plus_reference ? _mm256_castsi256_ps(second) : _mm256_setzero_ps();
    if (minus_teacher) key = _mm256_sub_ps(key, _mm256_castsi256_ps(first));
    if (rows.per_token) {
      key = _mm256_div_ps(key, _mm256_cvtepi32_ps(_mm256_max_epi32(count, one)));
    }
    const __m256 above = _mm256_cmp_ps(key, highs, _CMP_GT_OQ);
    const __m256 from = _mm256_cmp_ps(key, lows, _CMP_GE_OQ);
    const __m256 near = _mm256_andnot_ps(above, from);
    word.above |= static_cast<uint64_t>(_mm256_movemask_ps(above)) << i;
    word.unsure |= static_cast<uint64_t>(_mm256_movemask_ps(near)) << i;
    lowest = _mm256_min_ps(lowest, _mm256_blendv_ps(none, key, above));
  }
  alignas(32) uint32_t bits[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bits), largest);
  for (const uint32_t each : bits) word.odd |= each > Filter::kLargestSum;
  word.odd |= _mm256_movemask_ps(_mm256_castsi256_ps(wrong)) != 0;
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, lowest);
  word.lowest = *std::min_element(lanes, lanes + 8);
  return word;
}

bool HasAvx2() { return __builtin_cpu_supports("avx2") != 0; }
#else
WordBits CompareAvx2(const double* keys, double low, double high) {
  return CompareScalar(keys, 64, low, high);
}
bool FillKeysAvx2(const KeyRows& rows, int64_t at, int n, double* keys) {
  return FillKeys(rows, at, n, keys);
}
FilteredWord FilterAvx2(const KeyRows&, int64_t, const Filter&) { return {0, 0, 0.0f, true}; }
bool HasAvx2() { return false; }
#endif

// Whether this one row may not be used; only asked where a block holds one.
bool IsBad(const KeyRows& rows, int64_t row) {
  double key;
  return FillKeys(rows, row, 1, &key);
}

// A range of a column's rows [begin, end) as whole pages.
struct PageRange {
  PageRange(const void* column, int64_t begin, int64_t end, bool outwards) {
    const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const uintptr_t base = reinterpret_cast<uintptr_t>(column);
    const uintptr_t first = base + static_cast<uintptr_t>(begin) * 4;
    const uintptr_t last = base + static_cast<uintptr_t>(end) * 4;
    from = outwards ? first / page * page : (first + page - 1) / page * page;
    to = outwards ? last : last / page * page;
  }
  // A hint: where the kernel does not know it, reading faults the pages in.
  void Advise(int advice) const {
    if (from < to) ::madvise(reinterpret_cast<void*>(from), to - from, advice);
  }
  uintptr_t from, to;
};

// Gives the pages that lie wholly inside back to the kernel; its page cache keeps them.
void DropPages(const void* column, int64_t begin, int64_t end) {
  PageRange(column, begin, end, /*outwards=*/false).Advise(MADV_DONTNEED);
}

// Asks for pages that will be read soon; returns at once. In small pieces, because the kernel takes
// no more of a request than its own read-ahead, whatever is asked for.
void FetchPages(const void* column, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kFetchRows) {
    PageRange(column, at, std::min(at + kFetchRows, end), /*outwards=*/true).Advise(MADV_WILLNEED);
  }
}

// Maps the pages of a column's rows at once, which is cheaper than a fault for each few of them.
void MapPages(const void* column, int64_t begin, int64_t end) {
#ifdef MADV_POPULATE_READ
  PageRange(column, begin, end, /*outwards=*/true).Advise(MADV_POPULATE_READ);
#else
  static_cast<void>(column), static_cast<void>(begin), static_cast<void>(end);
#endif
}

template <typename Do>
void ForEachColumn(const KeyRows& rows, const Do& act) {
  if (rows.teacher_sum != nullptr) act(rows.teacher_sum), act(rows.teacher_tokens);
  if (rows.reference_sum != nullptr) act(rows.reference_sum), act(rows.reference_tokens);
}

}  // namespace

uint64_t KeyImage(double key) { return Image(key); }

// What one thread gathers; merged when it ends.
struct KeyScan::Worker {
  std::vector<Candidate> candidates;
  std::vector<StratumTotals> totals;
  std::vector<int64_t> histogram;
  std::vector<uint64_t> low_image;
  std::vector<int> shift;
  double lowest = kNone;
  int64_t bad_row = -1;
  int64_t room = 0;
  bool overflowed = false;
  bool avx2 = HasAvx2();
  Filter filter = {0, 0};
  alignas(64) double keys[kWordRows];  // of the word at hand, where they were needed
};

KeyScan::KeyScan(int64_t num_rows, std::vector<double> low, std::vector<double> high,
                 int64_t max_candidates, int buckets_log2)
    : num_rows_(num_rows),
      low_(std::move(low)),
      high_(std::move(high)),
      max_candidates_(max_candidates),
      buckets_log2_(buckets_log2),
      totals_(low_.size()),
      lowest_kept_(kNone) {
  if (num_rows_ < 0 || low_.empty() || low_.size() != high_.size() || low_.size() > 65536 ||
      max_candidates_ < 0 || buckets_log2_ < 0 || buckets_log2_ > 20) {
    throw std::invalid_argument("a scan needs rows >= 0, 1 to 65536 brackets with two ends each, "
                                "candidates >= 0 and at most 2**20 buckets");
  }
  bool single = false;
  for (size_t d = 0; d < low_.size(); ++d) {
    if (!(low_[d] <= high_[d])) {
      throw std::invalid_argument("bracket " + std::to_string(d) + " is empty: " +
                                  std::to_string(low_[d]) + " to " + std::to_string(high_[d]));
    }
    single |= low_[d] == high_[d];
  }
  const size_t words = static_cast<size_t>((num_rows_ + 63) / 64);
  if (buckets_log2_ == 0) {
    mask_.assign(words, 0);
    if (single) ties_.assign(words, 0);
  } else {
    histogram_.assign(low_.size() << buckets_log2_, 0);
  }
}

int KeyScan::ShiftOf(uint64_t low, uint64_t high, int log2) {
  const uint64_t range = high - low;
  int bits = 0;
  while (bits < 64 && (range >> bits) != 0) ++bits;
  return std::max(0, bits - log2);
}

void KeyScan::TakeInside(int64_t at, double key, size_t d, int32_t weight, Worker* worker) {
  StratumTotals& totals = worker->totals[d];
  totals.inside_rows += 1;
  totals.inside_weight += weight;
  if (buckets_log2_ > 0) {
    const uint64_t bucket = (Image(key) - worker->low_image[d]) >> worker->shift[d];
    worker->histogram[(d << buckets_log2_) + bucket] += weight;
  } else if (low_[d] == high_[d]) {
    ties_[at >> 6] |= uint64_t{1} << (at & 63);
  } else if (static_cast<int64_t>(worker->candidates.size()) < worker->room) {
    worker->candidates.push_back({key, at, weight, static_cast<uint16_t>(d)});
  } else {
    worker->overflowed = true;
  }
}

// Exact keys of a word into worker->keys; false if a row may not be used.
bool KeyScan::ExactKeys(int64_t first, const KeyRows& rows, int64_t row, int size,
                        Worker* worker) {
  const bool bad = worker->avx2 ? FillKeysAvx2(rows, row, size, worker->keys)
                                : FillKeys(rows, row, size, worker->keys);
  if (!bad) return true;
  while (!IsBad(rows, row)) ++row;
  worker->bad_row = first + row;
  return false;
}

// Where the rows of a word lie, by the filter: exact keys only of rows near the bracket, and of
// those above that may be lower than all before. False if the word needs all its keys.
bool KeyScan::FilterWord(const KeyRows& rows, int64_t row, uint64_t eligible, WordBits* bits,
                         Worker* worker) const {
  const FilteredWord word = FilterAvx2(rows, row, worker->filter);
  if (word.odd || __builtin_popcountll(word.unsure) > kFewRows) return false;
  const auto exact = [&](int i) {
    FillKeys(rows, row + i, 1, &worker->keys[i]);
    return worker->keys[i];
  };
  *bits = {word.above, 0, kNone};
  for (uint64_t rest = word.unsure; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctzll(rest);
    const double key = exact(i);
    if (key > high_[0]) {
      bits->above |= uint64_t{1} << i;
    } else if (key >= low_[0]) {
      bits->inside |= uint64_t{1} << i;
    }
  }
  if (buckets_log2_ > 0) return true;  // nobody asks for the lowest
  const bool maybe_lower = word.lowest - Filter::Slack(word.lowest) < worker->lowest;
  uint64_t lower = (maybe_lower ? bits->above : bits->above & word.unsure) & eligible;
  if (__builtin_popcountll(lower) > kFewRows) return false;
  for (; lower != 0; lower &= lower - 1) {
    bits->lowest = std::min(bits->lowest, exact(__builtin_ctzll(lower)));
  }
  return true;
}

// A word whose rows are all in one stratum; false if a row may not be used.
bool KeyScan::ScanWord(int64_t first, const KeyRows& rows, int64_t row, int size,
                       Worker* worker) {
  const uint64_t eligible = EligibleBits(rows, row, size);
  WordBits bits;
  const bool filtered = worker->filter.usable && size == kWordRows &&
                        FilterWord(rows, row, eligible, &bits, worker);
  if (!filtered) {
    if (!ExactKeys(first, rows, row, size, worker)) return false;
    bits = worker->avx2 && size == kWordRows
               ? CompareAvx2(worker->keys, low_[0], high_[0])
               : CompareScalar(worker->keys, size, low_[0], high_[0]);
  }
  const uint64_t above = bits.above & eligible;
  if (!filtered && above != bits.above) bits.lowest = LowestOf(worker->keys, above);
  StratumTotals& totals = worker->totals[0];
  const int eligible_rows = __builtin_popcountll(eligible);
  totals.rows += size;
  totals.eligible_rows += eligible_rows;
  totals.above_rows += __builtin_popcountll(above);
  if (rows.weights == nullptr) {
    totals.eligible_weight += eligible_rows;
    totals.above_weight += __builtin_popcountll(above);
  } else {
    for (int i = 0; i < size; ++i) {
      const int64_t weight = LoadWeight(rows.weights, row + i);
      totals.eligible_weight += (eligible >> i & 1) != 0 ? weight : 0;
      totals.above_weight += (above >> i & 1) != 0 ? weight : 0;
    }
  }
  for (uint64_t rest = bits.inside & eligible; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctzll(rest);
    TakeInside(first + row + i, worker->keys[i], 0, LoadWeight(rows.weights, row + i), worker);
  }
  if (buckets_log2_ == 0) Mark(first + row, above, bits.lowest, worker);
  return true;
}

// A word whose rows are in strata of their own; false if a row may not be used.
bool KeyScan::ScanStrata(int64_t first, const KeyRows& rows, int64_t row, int size,
                         Worker* worker) {
  if (!ExactKeys(first, rows, row, size, worker)) return false;
  const uint64_t eligible = EligibleBits(rows, row, size);
  uint64_t above = 0;
  double lowest = kNone;
  for (int i = 0; i < size; ++i) {
    const size_t d = rows.strata[row + i];
    if (d >= low_.size()) {
      worker->bad_row = first + row + i;
      return false;
    }
    StratumTotals& totals = worker->totals[d];
    totals.rows += 1;
    if ((eligible >> i & 1) == 0) continue;
    const int32_t weight = LoadWeight(rows.weights, row + i);
    const double key = worker->keys[i];
    totals.eligible_rows += 1;
    totals.eligible_weight += weight;
    if (key > high_[d]) {
      above |= uint64_t{1} << i;
      lowest = std::min(lowest, key);
      totals.above_rows += 1;
      totals.above_weight += weight;
    } else if (key >= low_[d]) {
      TakeInside(first + row + i, key, d, weight, worker);
    }
  }
  if (buckets_log2_ == 0) Mark(first + row, above, lowest, worker);
  return true;
}

void KeyScan::Mark(int64_t at, uint64_t above, double lowest, Worker* worker) {
  mask_[at >> 6] = above;
  worker->lowest = std::min(worker->lowest, lowest);
}

void KeyScan::ScanChunk(int64_t first, const KeyRows& rows, int64_t begin, int64_t end,
                        Worker* worker) {
  for (int64_t row = begin; row < end; row += kWordRows) {
    const int size = static_cast<int>(std::min<int64_t>(kWordRows, end - row));
    const bool good = rows.strata == nullptr ? ScanWord(first, rows, row, size, worker)
                                             : ScanStrata(first, rows, row, size, worker);
    if (!good) return;
  }
}

int64_t KeyScan::Add(int64_t first, const KeyRows& rows, int threads) {
  if (first < 0 || first % 64 != 0 || rows.count < 0 || first > num_rows_ - rows.count) {
    throw std::invalid_argument(std::to_string(rows.count) + " rows from row " +
                                std::to_string(first) + " do not fit a scan of " +
                                std::to_string(num_rows_) + " (blocks start at multiples of 64)");
  }
  const int64_t chunks = (rows.count + kChunkRows - 1) / kChunkRows;
  threads = ThreadsFor(threads, chunks);
  std::vector<Worker> workers(static_cast<size_t>(threads));
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  const int64_t room = max_candidates_ - num_candidates();
  const auto work = [&](Worker* worker) {
    try {
      worker->totals.resize(low_.size());
      worker->room = room / threads;
      worker->filter = Filter(low_[0], high_[0]);
      worker->filter.usable &= worker->avx2 && rows.rule != KeyRule::kRandom &&
                               rows.rule != KeyRule::kGiven;
      if (buckets_log2_ > 0) {
        worker->histogram.assign(histogram_.size(), 0);
        for (size_t d = 0; d < low_.size(); ++d) {
          worker->low_image.push_back(Image(low_[d]));
          worker->shift.push_back(ShiftOf(Image(low_[d]), Image(high_[d]), buckets_log2_));
        }
      }
      while (!stop) {
        const int64_t begin = next.fetch_add(1) * kChunkRows;
        if (begin >= rows.count) break;
        const int64_t end = std::min(begin + kChunkRows, rows.count);
        if (rows.drop_behind) {
          // The first chunk fetches all that follow within reach, then each the one at its end.
          const int64_t near = begin == 0 ? end : begin + kChunksAhead * kChunkRows;
          const int64_t far = std::min(begin + (kChunksAhead + 1) * kChunkRows, rows.count);
          ForEachColumn(rows, [&](const auto* column) {
            if (near < far) FetchPages(column, near, far);
            MapPages(column, begin, end);
          });
        }
        ScanChunk(first, rows, begin, end, worker);
        if (rows.drop_behind) {
          ForEachColumn(rows, [&](const auto* column) { DropPages(column, begin, end); });
        }
        if (worker->bad_row >= 0) stop = true;
      }
    } catch (...) {
      stop = true;
      throw;
    }
  };
  RunOnThreads(threads, [&](int number) { work(&workers[static_cast<size_t>(number)]); });
  int64_t bad_row = -1;
  for (Worker& worker : workers) {
    if (worker.bad_row >= 0 && (bad_row < 0 || worker.bad_row < bad_row)) bad_row = worker.bad_row;
    Merge(&worker);
  }
  return bad_row;
}

void KeyScan::Merge(Worker* worker) {
  for (size_t d = 0; d < totals_.size(); ++d) {
    StratumTotals& to = totals_[d];
    const StratumTotals& from = worker->totals[d];
    to.rows += from.rows;
    to.eligible_rows += from.eligible_rows;
    to.eligible_weight += from.eligible_weight;
    to.above_rows += from.above_rows;
    to.above_weight += from.above_weight;
    to.inside_rows += from.inside_rows;
    to.inside_weight += from.inside_weight;
  }
  for (size_t i = 0; i < worker->histogram.size(); ++i) histogram_[i] += worker->histogram[i];
  lowest_kept_ = std::min(lowest_kept_, worker->lowest);
  overflowed_ |= worker->overflowed;
  if (!worker->candidates.empty()) candidates_.push_back(std::move(worker->candidates));
}

int64_t KeyScan::num_candidates() const {
  int64_t total = 0;
  for (const auto& list : candidates_) total += static_cast<int64_t>(list.size());
  return total;
}

void KeyScan::CandidateHistogram(const std::vector<double>& low, const std::vector<double>& high,
                                 int log2, int64_t* weights) const {
  std::vector<uint64_t> low_image;
  std::vector<int> shift;
  for (size_t d = 0; d < low.size(); ++d) {
    low_image.push_back(Image(low[d]));
    shift.push_back(ShiftOf(Image(low[d]), Image(high[d]), log2));
  }
  for (const auto& list : candidates_) {
    for (const Candidate& candidate : list) {
      const size_t d = candidate.stratum;
      if (candidate.key < low[d] || candidate.key > high[d]) continue;
      const uint64_t bucket = (Image(candidate.key) - low_image[d]) >> shift[d];
      weights[(d << log2) + bucket] += candidate.weight;
    }
  }
}

std::vector<int64_t> KeyScan::TieWeights(const std::vector<double>& threshold) const {
  std::vector<int64_t> weights(totals_.size(), 0);
  for (size_t d = 0; d < weights.size(); ++d) {
    if (low_[d] == high_[d] && low_[d] == threshold[d]) weights[d] = totals_[d].inside_weight;
  }
  for (const auto& list : candidates_) {
    for (const Candidate& candidate : list) {
      if (candidate.key == threshold[candidate.stratum]) {
        weights[candidate.stratum] += candidate.weight;
      }
    }
  }
  return weights;
}

void KeyScan::Choose(const std::vector<double>& threshold, std::vector<int64_t> taken,
                     const std::vector<int64_t>& budget, const KeyRows& rows) {
  if (ties_.empty()) ties_.assign(mask_.size(), 0);
  for (auto& list : candidates_) {
    for (const Candidate& candidate : list) {
      const double limit = threshold[candidate.stratum];
      if (candidate.key > limit) {
        SetBit(candidate.row);
        lowest_kept_ = std::min(lowest_kept_, candidate.key);
      } else if (candidate.key == limit) {
        ties_[candidate.row >> 6] |= uint64_t{1} << (candidate.row & 63);
      }
    }
    std::vector<Candidate>().swap(list);
  }
  for (size_t word = 0; word < ties_.size(); ++word) {
    for (uint64_t rest = ties_[word]; rest != 0; rest &= rest - 1) {
      const int64_t row = static_cast<int64_t>(word) * 64 + __builtin_ctzll(rest);
      const size_t d = rows.strata != nullptr ? rows.strata[row] : 0;
      taken[d] += LoadWeight(rows.weights, row);
      if (taken[d] > budget[d]) continue;
      SetBit(row);
      lowest_kept_ = std::min(lowest_kept_, threshold[d]);
    }
  }
  std::vector<uint64_t>().swap(ties_);
}

void TallyRows(const TallyColumns& rows, const uint8_t* mask, Tally* tally) {
  const int64_t longest = static_cast<int64_t>(tally->lengths.size()) / 2 - 1;
  const size_t domains = tally->domains.size() / 4;
  for (int64_t row = 0; row < rows.count; ++row) {
    const size_t kept = mask != nullptr ? mask[row >> 3] >> (row & 7) & 1 : 0;
    const int64_t length = LoadWeight(rows.lengths, row);
    const size_t d = rows.domains != nullptr ? rows.domains[row] : 0;
    if (length < 0 || length > longest || d >= domains) {
      throw std::invalid_argument("row " + std::to_string(row) + " has " + std::to_string(length) +
                                  " tokens and domain " + std::to_string(d) + ", at most " +
                                  std::to_string(longest) + " and " + std::to_string(domains - 1));
    }
    tally->domains[4 * d + kept] += 1;
    tally->domains[4 * d + 2 + kept] += length;
    tally->lengths[2 * static_cast<size_t>(length) + kept] += 1;
  }
}

}  // namespace miniplm
