#include "logit_codec.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace miniplm {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the layout is little-endian");

constexpr int kRiceBits = 5;

void Require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

int HighestBit(uint64_t value) { return 63 - __builtin_clzll(value); }

// 16 bits hold a range: the upper half of a float32, never below the range itself.
uint16_t RangeUp(float range) {
  uint32_t image;
  std::memcpy(&image, &range, sizeof image);
  return static_cast<uint16_t>((image + 0xffffu) >> 16);
}

float RangeOf(uint16_t half) {
  const uint32_t image = static_cast<uint32_t>(half) << 16;
  float range;
  std::memcpy(&range, &image, sizeof range);
  return range;
}

class BitWriter {
 public:
  explicit BitWriter(std::vector<uint8_t>* out) : out_(out) {}

  // The low `count` (0 to 32) bits of a value that has no others.
  void Put(uint64_t value, int count) {
    pending_ |= value << held_;
    held_ += count;
    while (held_ >= 8) {
      out_->push_back(static_cast<uint8_t>(pending_));
      pending_ >>= 8;
      held_ -= 8;
    }
  }

  // `zeros` zeros and a one.
  void PutUnary(uint64_t zeros) {
    for (; zeros >= 32; zeros -= 32) Put(0, 32);
    Put(uint64_t{1} << zeros, static_cast<int>(zeros) + 1);
  }

  void Flush() {
    if (held_ > 0) out_->push_back(static_cast<uint8_t>(pending_));
    pending_ = 0;
    held_ = 0;
  }

 private:
  std::vector<uint8_t>* out_;
  uint64_t pending_ = 0;
  int held_ = 0;  // below 8 between calls
};

class BitReader {
 public:
  BitReader(const uint8_t* data, int64_t size) : at_(data), end_(data + size) {}

  // The next `count` (0 to 32) bits.
  uint64_t Get(int count) {
    Need(count);
    const uint64_t value = pending_ & ((uint64_t{1} << count) - 1);
    Drop(count);
    return value;
  }

  // Zeros before the next one, which is taken as well; more than `most` are refused.
  uint64_t GetUnary(uint64_t most) {
    uint64_t zeros = 0;
    for (;;) {
      Fill();
      Require(held_ > 0, "its bits end early");
      // Above the held bits, pending_ is zero: only what is held is counted.
      const int run = pending_ == 0 ? held_ : std::min(__builtin_ctzll(pending_), held_);
      zeros += static_cast<uint64_t>(run);
      Require(zeros <= most, "a level is above the highest");
      const bool found = run < held_;
      Drop(found ? run + 1 : run);
      if (found) return zeros;
    }
  }

  // The byte after the last one that was begun; refuses set bits between.
  const uint8_t* Finish() {
    Require((pending_ & ((uint64_t{1} << (held_ % 8)) - 1)) == 0, "padding bits are set");
    return at_ - held_ / 8;
  }

 private:
  void Fill() {
    if (end_ - at_ >= 8) {
      uint64_t next;
      std::memcpy(&next, at_, sizeof next);
      const int bytes = (63 - held_) / 8;
      next &= (uint64_t{1} << (8 * bytes)) - 1;
      pending_ |= next << held_;
      at_ += bytes;
      held_ += 8 * bytes;
      return;
    }
    for (; held_ <= 55 && at_ < end_; held_ += 8) {
      pending_ |= static_cast<uint64_t>(*at_++) << held_;
    }
  }

  void Need(int count) {
    if (held_ >= count) return;
    Fill();
    Require(held_ >= count, "its bits end early");
  }

  void Drop(int count) {
    pending_ >>= count;  // at most 56
    held_ -= count;
  }

  const uint8_t* at_;
  const uint8_t* end_;
  uint64_t pending_ = 0;
  int held_ = 0;  // at most 63
};

// A number of [0, size) in minimal binary: the first ones take a bit less than the others.
void PutMinimal(uint64_t value, uint64_t size, BitWriter* bits) {
  const int low = HighestBit(size);
  const uint64_t shorter = (uint64_t{2} << low) - size;
  if (value < shorter) {
    bits->Put(value, low);
  } else {
    const uint64_t longer = value + shorter;  // its upper `low` bits are no shorter code
    bits->Put(longer >> 1, low);
    bits->Put(longer & 1, 1);
  }
}

uint64_t GetMinimal(uint64_t size, BitReader* bits) {
  const int low = HighestBit(size);
  const uint64_t shorter = (uint64_t{2} << low) - size;
  const uint64_t value = bits->Get(low);
  return value < shorter ? value : 2 * value + bits->Get(1) - shorter;
}

// Ascending ids in [low, high]; the depth of the recursion is log2 of their number.
void PutIds(const int32_t* ids, int64_t count, int64_t low, int64_t high, BitWriter* bits) {
  if (count == 0) return;
  const int64_t middle = count / 2;
  const int64_t id = ids[middle];
  const int64_t least = low + middle;
  const int64_t most = high - (count - 1 - middle);
  PutMinimal(static_cast<uint64_t>(id - least), static_cast<uint64_t>(most - least + 1), bits);
  PutIds(ids, middle, low, id - 1, bits);
  PutIds(ids + middle + 1, count - 1 - middle, id + 1, high, bits);
}

void GetIds(int32_t* ids, int64_t count, int64_t low, int64_t high, BitReader* bits) {
  if (count == 0) return;
  const int64_t middle = count / 2;
  const int64_t least = low + middle;
  const int64_t most = high - (count - 1 - middle);
  const int64_t id =
      least + static_cast<int64_t>(GetMinimal(static_cast<uint64_t>(most - least + 1), bits));
  ids[middle] = static_cast<int32_t>(id);
  GetIds(ids, middle, low, id - 1, bits);
  GetIds(ids + middle + 1, count - 1 - middle, id + 1, high, bits);
}

// The parameter with which the levels take the fewest bits; `bits` itself means plain binary.
int BestRice(const std::vector<uint32_t>& levels, int bits) {
  int best = bits;
  uint64_t least = static_cast<uint64_t>(bits) * levels.size();
  for (int rice = 0; rice < bits; ++rice) {
    uint64_t size = static_cast<uint64_t>(rice + 1) * levels.size();
    for (const uint32_t level : levels) size += level >> rice;
    if (size < least) {
      least = size;
      best = rice;
    }
  }
  return best;
}

void PutLevels(const std::vector<uint32_t>& levels, int bits, BitWriter* out) {
  const int rice = BestRice(levels, bits);
  out->Put(static_cast<uint64_t>(rice), kRiceBits);
  const uint32_t low = (uint32_t{1} << rice) - 1;
  for (const uint32_t level : levels) {
    if (rice < bits) out->PutUnary(level >> rice);
    out->Put(level & low, rice);
  }
}

void Check(const KeptLogits& logits, int64_t vocab, int bits) {
  Require((bits >= 1 && bits <= 16) || bits == kExactBits, "bits must be 1 to 16, or 32");
  Require(vocab >= 1 && vocab <= INT32_MAX, "vocab must be 1 to 2^31 - 1");
  int64_t entry = 0;
  for (int64_t n = 0; n < logits.positions; ++n) {
    Require(logits.counts[n] <= vocab, "a count exceeds the vocabulary");
    Require(logits.counts[n] <= logits.entries - entry, "counts exceed the entries");
    int64_t before = -1;
    for (const int64_t end = entry + logits.counts[n]; entry < end; ++entry) {
      Require(logits.ids[entry] > before && logits.ids[entry] < vocab,
              "ids must ascend within the vocabulary");
      Require(std::isfinite(logits.log_probs[entry]), "a log-prob is not finite");
      before = logits.ids[entry];
    }
  }
  Require(entry == logits.entries, "counts are less than the entries");
}

template <typename T>
void Append(const std::vector<T>& values, std::vector<uint8_t>* out) {
  const uint8_t* data = reinterpret_cast<const uint8_t*>(values.data());
  out->insert(out->end(), data, data + sizeof(T) * values.size());
}

// Where the arrays of a layout lie; taking them refuses what is not there.
class Bytes {
 public:
  Bytes(const uint8_t* data, int64_t size) : at_(data), left_(size) {}

  const uint8_t* Take(int64_t size) {
    Require(size <= left_, "it ends early");
    const uint8_t* taken = at_;
    at_ += size;
    left_ -= size;
    return taken;
  }

  uint32_t TakeNumber() {
    uint64_t number = 0;
    for (int shift = 0; shift < 35; shift += 7) {
      const uint8_t byte = *Take(1);
      number |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) {
        Require(number <= UINT32_MAX, "a count is too large");
        return static_cast<uint32_t>(number);
      }
    }
    throw std::invalid_argument("a count is too long");
  }

  const uint8_t* at() const { return at_; }
  int64_t left() const { return left_; }

 private:
  const uint8_t* at_;
  int64_t left_;
};

template <typename T>
T Load(const uint8_t* array, int64_t index) {
  T value;
  std::memcpy(&value, array + sizeof(T) * static_cast<size_t>(index), sizeof value);
  return value;
}

void GetLevels(double top, double range, int64_t count, int bits, BitReader* in, float* out) {
  const uint64_t highest = (uint64_t{1} << bits) - 1;
  const double step = range / static_cast<double>(highest);
  const int rice = static_cast<int>(in->Get(kRiceBits));
  Require(rice <= bits, "a Rice parameter is too large");
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t high = rice < bits ? in->GetUnary(highest >> rice) : 0;
    const uint64_t level = (high << rice) | in->Get(rice);
    Require(level <= highest, "a level is above the highest");
    out[i] = static_cast<float>(top - static_cast<double>(highest - level) * step);
  }
}

}  // namespace

std::vector<uint8_t> EncodeLogits(const KeptLogits& logits, int64_t vocab, int bits) {
  Check(logits, vocab, bits);
  std::vector<uint8_t> counts;
  std::vector<uint8_t> stream;
  std::vector<float> tops;
  std::vector<uint16_t> ranges;
  std::vector<uint32_t> levels;
  stream.reserve(static_cast<size_t>(3 * logits.entries));
  BitWriter out(&stream);
  const bool exact = bits == kExactBits;
  const double highest = exact ? 0 : static_cast<double>((1 << bits) - 1);
  const int32_t* ids = logits.ids;
  const float* log_probs = logits.log_probs;
  for (int64_t n = 0; n < logits.positions; ++n) {
    const int64_t count = logits.counts[n];
    uint32_t left = logits.counts[n];
    for (; left >= 0x80; left >>= 7) counts.push_back(static_cast<uint8_t>(left | 0x80));
    counts.push_back(static_cast<uint8_t>(left));
    PutIds(ids, count, 0, vocab - 1, &out);
    if (!exact && count > 0) {
      const auto [least, most] = std::minmax_element(log_probs, log_probs + count);
      double top = *most;
      if (count > 1) {
        ranges.push_back(RangeUp(*most - *least));
        const double step = RangeOf(ranges.back()) / highest;
        Require(std::isfinite(step), "log-probs are too far apart");
        double mass = 0;
        double decoded = 0;
        levels.clear();
        for (int64_t i = 0; i < count; ++i) {
          const double below = step > 0 ? std::round((top - log_probs[i]) / step) : 0;
          levels.push_back(static_cast<uint32_t>(highest - std::min(below, highest)));
          mass += std::exp(log_probs[i] - top);
          decoded += std::exp(-below * step);
        }
        PutLevels(levels, bits, &out);
        top += std::log(mass / decoded);
      }
      tops.push_back(static_cast<float>(top));
    }
    ids += count;
    log_probs += count;
  }
  out.Flush();
  Append(tops, &counts);
  Append(ranges, &counts);
  counts.insert(counts.end(), stream.begin(), stream.end());
  if (exact) {
    Append(std::vector<float>(logits.log_probs, logits.log_probs + logits.entries), &counts);
  }
  return counts;
}

void DecodeLogits(const uint8_t* data, int64_t size, int64_t vocab, int bits, int64_t positions,
                  int64_t entries, uint32_t* counts, int32_t* ids, float* log_probs) {
  Require((bits >= 1 && bits <= 16) || bits == kExactBits, "its bits are none of 1 to 16 and 32");
  Require(vocab >= 1 && vocab <= INT32_MAX, "its vocabulary is none");
  const bool exact = bits == kExactBits;
  Bytes bytes(data, size);
  int64_t total = 0;
  int64_t with_entries = 0;
  int64_t with_range = 0;
  for (int64_t n = 0; n < positions; ++n) {
    counts[n] = bytes.TakeNumber();
    Require(counts[n] <= vocab, "a count exceeds the vocabulary");
    total += counts[n];
    Require(total <= entries, "its counts exceed its entries");
    with_entries += counts[n] > 0;
    with_range += counts[n] > 1;
  }
  Require(total == entries, "its counts are less than its entries");
  const uint8_t* tops = exact ? nullptr : bytes.Take(4 * with_entries);
  const uint8_t* ranges = exact ? nullptr : bytes.Take(2 * with_range);
  BitReader in(bytes.at(), bytes.left());
  int64_t top = 0;
  int64_t range = 0;
  float* values = log_probs;
  for (int64_t n = 0; n < positions; ++n) {
    const int64_t count = counts[n];
    GetIds(ids, count, 0, vocab - 1, &in);
    if (!exact && count > 0) {
      const float highest = Load<float>(tops, top++);
      Require(std::isfinite(highest), "a log-prob is not finite");
      if (count == 1) {
        values[0] = highest;
      } else {
        const float width = RangeOf(Load<uint16_t>(ranges, range++));
        // Not so for NaN either.
        Require(width >= 0 && highest - double{width} >= -FLT_MAX, "a range is not finite");
        GetLevels(highest, width, count, bits, &in, values);
      }
    }
    ids += count;
    values += count;
  }
  bytes.Take(in.Finish() - bytes.at());
  if (exact && entries > 0) {
    std::memcpy(log_probs, bytes.Take(4 * entries), sizeof(float) * static_cast<size_t>(entries));
  }
  Require(bytes.left() == 0, "it goes on after its end");
}

}  // namespace miniplm
