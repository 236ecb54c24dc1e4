// Finds the highest keys of a shard of any size in one sequential pass, given a bracket that the
// K-th key is believed to lie in: rows above the bracket get a bit, rows inside become candidates
// that are few enough to keep in memory, and everything is counted, so that a wrong belief is seen
// and corrected by another pass (selection/streaming.py drives this; one KeyScan a shard).
//
// A key is computed in float64 exactly as numpy does it: sum / max(tokens, 1) or sum, and
// differences of those. -0.0 counts as 0.0. The image of a key is the unsigned 64-bit integer that
// orders as keys do; histograms divide a bracket into equal ranges of images. Rows that float32
// arithmetic shows to be well above or below the bracket are not computed in float64.

#ifndef MEGATRON_MINIPLM_CSRC_SELECT_H_
#define MEGATRON_MINIPLM_CSRC_SELECT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace miniplm {

enum class KeyRule : int { kDifference = 0, kTeacher = 1, kReference = 2, kRandom = 3, kGiven = 4 };

// Columns of `count` consecutive rows. What a rule does not read may be null; scores that are given
// are checked, read or not.
struct KeyRows {
  KeyRule rule = KeyRule::kGiven;
  bool per_token = true;  // mean over tokens, else the sum
  const float* teacher_sum = nullptr;
  const int32_t* teacher_tokens = nullptr;
  const float* reference_sum = nullptr;
  const int32_t* reference_tokens = nullptr;
  const double* keys = nullptr;           // kGiven
  const int64_t* ids = nullptr;           // kRandom; null: first_id, first_id + 1, ...
  int64_t first_id = 0;
  uint64_t random_state = 0;              // kRandom: start of the mixer
  const int32_t* eligible_tokens = nullptr;  // with least_tokens: rows with fewer are left out
  int32_t least_tokens = 0;
  const unsigned char* weights = nullptr;  // int32[count], maybe unaligned; null: 1 a row
  const uint16_t* strata = nullptr;        // null: all rows in stratum 0
  int64_t count = 0;
  bool drop_behind = false;  // columns are read-only file mappings: give pages back once read
};

// Of one stratum. Weights are rows, or tokens where the budget is in tokens.
struct StratumTotals {
  int64_t rows = 0;           // all rows, eligible or not
  int64_t eligible_rows = 0;
  int64_t eligible_weight = 0;
  int64_t above_rows = 0;     // above the bracket
  int64_t above_weight = 0;
  int64_t inside_rows = 0;    // inside it, both ends included
  int64_t inside_weight = 0;
};

struct Candidate {
  double key;
  int64_t row;  // of the shard
  int32_t weight;
  uint16_t stratum;
};

uint64_t KeyImage(double key);

// Where the rows of a word of the mask lie, a bit each.
struct WordBits {
  uint64_t above, inside;  // of a bracket
  double lowest;           // key above
};

// One pass over one shard. Rows are added block by block; blocks start at multiples of 64 rows.
class KeyScan {
 public:
  // `low` and `high` hold one closed bracket a stratum. With `buckets_log2` = 0 rows inside are
  // collected, `max_candidates` at most; otherwise only their histogram is taken.
  KeyScan(int64_t num_rows, std::vector<double> low, std::vector<double> high,
          int64_t max_candidates, int buckets_log2);

  // Adds rows [first, first + rows.count) with up to `threads` threads (0: all cores). Returns the
  // first row whose scores or key no selection may use, or -1; after that the scan is worthless.
  int64_t Add(int64_t first, const KeyRows& rows, int threads);

  // Sets the bits of candidates with a key above threshold[d], and of those equal to it, in row
  // order, while `taken[d]` plus their running weight is at most budget[d]. `rows` are the columns
  // that Add was given, of the whole shard (only weights and strata are read).
  void Choose(const std::vector<double>& threshold, std::vector<int64_t> taken,
              const std::vector<int64_t>& budget, const KeyRows& rows);

  // Weight of the candidates in each of 2^log2 equal ranges of images of the brackets, [D][2^log2].
  void CandidateHistogram(const std::vector<double>& low, const std::vector<double>& high, int log2,
                          int64_t* weights) const;
  // Weight of the rows inside that are equal to threshold[d], [D].
  std::vector<int64_t> TieWeights(const std::vector<double>& threshold) const;

  int64_t num_rows() const { return num_rows_; }
  int num_strata() const { return static_cast<int>(low_.size()); }
  bool overflowed() const { return overflowed_; }
  int64_t num_candidates() const;
  const std::vector<StratumTotals>& totals() const { return totals_; }
  const std::vector<int64_t>& histogram() const { return histogram_; }
  const std::vector<uint64_t>& mask() const { return mask_; }
  // Lowest key among rows above the bracket or chosen; +infinity where there is none.
  double lowest_kept() const { return lowest_kept_; }
  static int ShiftOf(uint64_t low, uint64_t high, int log2);

 private:
  struct Worker;
  void ScanChunk(int64_t first, const KeyRows& rows, int64_t begin, int64_t end, Worker* worker);
  bool ScanWord(int64_t first, const KeyRows& rows, int64_t row, int size, Worker* worker);
  bool ScanStrata(int64_t first, const KeyRows& rows, int64_t row, int size, Worker* worker);
  bool FilterWord(const KeyRows& rows, int64_t row, uint64_t eligible, WordBits* bits,
                  Worker* worker) const;
  static bool ExactKeys(int64_t first, const KeyRows& rows, int64_t row, int size,
                        Worker* worker);
  void TakeInside(int64_t at, double key, size_t d, int32_t weight, Worker* worker);
  void Mark(int64_t at, uint64_t above, double lowest, Worker* worker);
  void Merge(Worker* worker);
  void SetBit(int64_t row) { mask_[row >> 6] |= uint64_t{1} << (row & 63); }

  const int64_t num_rows_;
  const std::vector<double> low_, high_;
  const int64_t max_candidates_;
  const int buckets_log2_;
  std::vector<uint64_t> mask_;   // rows above, later also the chosen ones
  std::vector<uint64_t> ties_;   // rows inside a bracket of one value, which need no candidate
  std::vector<std::vector<Candidate>> candidates_;  // one list a thread, in no order
  std::vector<StratumTotals> totals_;
  std::vector<int64_t> histogram_;  // [D][2^buckets_log2] weights
  double lowest_kept_;
  bool overflowed_ = false;
};

// What is counted of the rows of a shard.
struct TallyColumns {
  const unsigned char* lengths = nullptr;  // int32[count], maybe unaligned
  const uint16_t* domains = nullptr;       // null: all rows in domain 0
  int64_t count = 0;
};

// Exact counts of rows by domain and by length; [0] of a pair is for rows dropped, [1] for kept.
struct Tally {
  std::vector<int64_t> domains;  // [D][rows, tokens][2]
  std::vector<int64_t> lengths;  // [longest + 1][2] rows
};

// Adds all rows; bit r % 8 of mask[r / 8] says whether row r is kept (null: none is). Throws
// std::invalid_argument for a length or a domain that the tally has no place for.
void TallyRows(const TallyColumns& rows, const uint8_t* mask, Tally* tally);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_SELECT_H_
