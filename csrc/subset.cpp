#include "subset.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "files.h"
#include "threads.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Megatron's index files are little-endian, and these are written as they lie in memory"
#endif

namespace miniplm {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr uint64_t kVersion = 1;
// Rows that one thread takes at a time; a multiple of 8, so that no byte of a mask is shared.
constexpr int64_t kChunkRows = int64_t{1} << 18;
// The same where their tokens are copied: some tens of megabytes.
constexpr int64_t kCopyRows = int64_t{1} << 14;
constexpr char kWritingIndex[] = "writing a subset's index";
constexpr char kCopying[] = "copying a subset's tokens";

template <typename T>
T Load(const unsigned char* array, int64_t index) {
  T value;
  std::memcpy(&value, array + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

void WriteHeader(int descriptor, uint8_t dtype_code, int64_t num_rows) {
  const uint64_t sequences = static_cast<uint64_t>(num_rows);
  const uint64_t boundaries = sequences + 1;
  unsigned char header[34];
  unsigned char* next = header;
  const auto put = [&next](const void* value, size_t size) {
    std::memcpy(next, value, size);
    next += size;
  };
  put(kMagic, sizeof(kMagic));
  put(&kVersion, sizeof(kVersion));
  put(&dtype_code, sizeof(dtype_code));
  put(&sequences, sizeof(sequences));
  put(&boundaries, sizeof(boundaries));
  WriteAllAt(descriptor, header, sizeof(header), 0, kWritingIndex);
}

[[noreturn]] void RefuseSpan(int64_t row, int64_t pointer, int64_t length,
                             const IndexView& parent) {
  throw std::invalid_argument("sequence " + std::to_string(row) + " has " + std::to_string(length) +
                              " tokens of " + std::to_string(parent.bytes_per_token) +
                              " bytes at byte " + std::to_string(pointer) + ", outside a .bin of " +
                              std::to_string(parent.bin_bytes) + " bytes");
}

// True if the sequence lies inside the .bin; no step of it can overflow, whatever the file says.
bool Fits(int64_t pointer, int64_t length, const IndexView& parent) {
  return pointer >= 0 && length >= 0 && pointer <= parent.bin_bytes &&
         length <= (parent.bin_bytes - pointer) / parent.bytes_per_token;
}

// Gives the pages that lie wholly inside [begin, end) of a mapped array back to the kernel.
void DropPages(const unsigned char* array, int64_t begin, int64_t end, int64_t item) {
  const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t base = reinterpret_cast<uintptr_t>(array);
  const uintptr_t from = (base + static_cast<uintptr_t>(begin * item) + page - 1) / page * page;
  const uintptr_t to = (base + static_cast<uintptr_t>(end * item)) / page * page;
  if (from < to) ::madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
}

void DropIndexPages(const IndexView& parent, int64_t begin, int64_t end) {
  DropPages(parent.lengths, begin, end, sizeof(int32_t));
  DropPages(parent.pointers, begin, end, sizeof(int64_t));
}

// Calls act(row) for every chosen row in [begin, end), ascending; begin is a multiple of 8.
template <typename Act>
void ForEachChosen(const ChosenRows& chosen, int64_t begin, int64_t end, const Act& act) {
  for (int64_t base = begin; base < end; base += 8) {
    unsigned bits = chosen.bits[base / 8];
    if (end - base < 8) bits &= (1u << (end - base)) - 1;
    for (; bits != 0; bits &= bits - 1) act(base + __builtin_ctz(bits));
  }
}

// Runs act(chunk) for every chunk on up to `threads` threads; the first exception is thrown on.
template <typename Act>
void ForEachChunk(int64_t chunks, int threads, const Act& act) {
  std::atomic<int64_t> next{0};
  RunOnThreads(ThreadsFor(threads, chunks), [&](int) {
    try {
      for (int64_t chunk = next++; chunk < chunks; chunk = next++) act(chunk);
    } catch (...) {
      next = chunks;
      throw;
    }
  });
}

// Bytes of a sequence, after checking that it lies inside the .bin.
struct Span {
  int64_t begin, end;
};

Span CheckedSpan(const IndexView& parent, int64_t row) {
  const int32_t length = Load<int32_t>(parent.lengths, row);
  const int64_t pointer = Load<int64_t>(parent.pointers, row);
  if (!Fits(pointer, length, parent)) RefuseSpan(row, pointer, length, parent);
  return {pointer, pointer + length * parent.bytes_per_token};
}

// Gathers ranges of one file into a part of another through large buffers.
class RangeCopier {
 public:
  // Writes from byte `offset` of `target` on.
  RangeCopier(int source, int target, int64_t offset)
      : source_(source), target_(target), written_(offset) {
    window_.resize(kWindow);
    out_.reserve(2 * kWindow);
  }

  void Add(Span range) {
    if (range.end - range.begin >= kLong) {
      Flush();
      CopyLong(range);
      return;
    }
    const bool near = !ranges_.empty() && range.begin >= ranges_.back().end &&
                      range.end - ranges_.front().begin <= kWindow;
    if (!near) Read();
    ranges_.push_back(range);
  }

  void Flush() {
    Read();
    WriteOut();
  }

 private:
  static constexpr int64_t kWindow = int64_t{1} << 20;  // of the source, read at once
  static constexpr int64_t kLong = int64_t{1} << 20;    // worth a system call of its own

  // Takes the gathered ranges from the source: in one read where a quarter of it is wanted.
  void Read() {
    if (ranges_.empty()) return;
    int64_t wanted = 0;
    for (const Span& range : ranges_) wanted += range.end - range.begin;
    const int64_t begin = ranges_.front().begin, size = ranges_.back().end - begin;
    const bool whole = wanted * 4 >= size;
    if (whole) ReadAllAt(source_, window_.data(), static_cast<size_t>(size), begin, kCopying);
    for (const Span& range : ranges_) {
      const size_t at = out_.size(), bytes = static_cast<size_t>(range.end - range.begin);
      out_.resize(at + bytes);
      if (whole) {
        std::memcpy(out_.data() + at, window_.data() + (range.begin - begin), bytes);
      } else {
        ReadAllAt(source_, out_.data() + at, bytes, range.begin, kCopying);
      }
    }
    ranges_.clear();
    if (static_cast<int64_t>(out_.size()) >= kWindow) WriteOut();
  }

  void WriteOut() {
    WriteAllAt(target_, out_.data(), out_.size(), written_, kCopying);
    written_ += static_cast<int64_t>(out_.size());
    out_.clear();
  }

  void CopyLong(Span range) {
    loff_t from = range.begin, to = written_;
    while (in_kernel_ && from < range.end) {
      const ssize_t done = ::copy_file_range(source_, &from, target_, &to,
                                             static_cast<size_t>(range.end - from), 0);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) {
        throw std::system_error(errno, std::generic_category(), kCopying);
      }
      if (done <= 0) in_kernel_ = false;  // not between these file systems: read and write instead
    }
    if (to > written_) StartWriteback(target_, written_, to - written_);
    written_ = to;
    while (from < range.end) {
      const int64_t size = std::min<int64_t>(kWindow, range.end - from);
      ReadAllAt(source_, window_.data(), static_cast<size_t>(size), from, kCopying);
      WriteAllAt(target_, window_.data(), static_cast<size_t>(size), written_, kCopying);
      from += size;
      written_ += size;
    }
  }

  const int source_, target_;
  int64_t written_;  // offset in the target
  std::vector<unsigned char> window_, out_;
  std::vector<Span> ranges_;
  bool in_kernel_ = true;
};

// A choice of rows of an index, in chunks that threads take.
class ChosenChunks {
 public:
  ChosenChunks(const IndexView& parent, const ChosenRows& chosen, int64_t chunk_rows)
      : parent_(parent), chosen_(chosen), chunk_rows_(chunk_rows) {
    if (parent.bytes_per_token < 1 || chosen.num_rows != parent.count) {
      throw std::invalid_argument(std::to_string(chosen.num_rows) + " rows of an index of " +
                                  std::to_string(parent.count) + ", tokens of " +
                                  std::to_string(parent.bytes_per_token) + " bytes");
    }
  }

  int64_t count() const { return (parent_.count + chunk_rows_ - 1) / chunk_rows_; }
  int64_t begin(int64_t chunk) const { return chunk * chunk_rows_; }
  int64_t end(int64_t chunk) const { return std::min((chunk + 1) * chunk_rows_, parent_.count); }

  // Calls act(row) for every chosen row of a chunk, ascending.
  template <typename Act>
  void ForEachRow(int64_t chunk, const Act& act) const {
    ForEachChosen(chosen_, begin(chunk), end(chunk), act);
  }

  // Where each chunk's rows start among the chosen ones if each row counts as value(row) says, and
  // the total at the end.
  template <typename Value>
  std::vector<int64_t> Starts(int threads, const Value& value) const {
    std::vector<int64_t> starts(static_cast<size_t>(count()) + 1, 0);
    ForEachChunk(count(), threads, [&](int64_t chunk) {
      int64_t sum = 0;
      ForEachRow(chunk, [&](int64_t row) { sum += value(row); });
      starts[static_cast<size_t>(chunk) + 1] = sum;
    });
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    return starts;
  }

  void DropPages(int64_t chunk) const { DropIndexPages(parent_, begin(chunk), end(chunk)); }

 private:
  const IndexView& parent_;
  const ChosenRows& chosen_;
  const int64_t chunk_rows_;
};

}  // namespace

WrittenIndex WriteMaskedIndex(int descriptor, const IndexView& parent, const ChosenRows& chosen,
                              bool contiguous, bool drop_behind, int threads) {
  const ChosenChunks chunks(parent, chosen, kChunkRows);
  const std::vector<int64_t> row_starts = chunks.Starts(threads, [](int64_t) { return 1; });
  // Where each chunk's tokens start; only pointers of a .bin of its own need them.
  std::vector<int64_t> token_starts;
  if (contiguous) {
    token_starts = chunks.Starts(
        threads, [&](int64_t row) { return int64_t{Load<int32_t>(parent.lengths, row)}; });
  }
  const int64_t total = row_starts.back();
  WriteHeader(descriptor, parent.dtype_code, total);
  const int64_t lengths_at = 34, pointers_at = lengths_at + 4 * total;
  const int64_t boundaries_at = pointers_at + 8 * total;
  std::atomic<int64_t> num_tokens{0};
  ForEachChunk(chunks.count(), threads, [&](int64_t chunk) {
    const int64_t first = row_starts[static_cast<size_t>(chunk)];
    const int64_t count = row_starts[static_cast<size_t>(chunk) + 1] - first;
    std::vector<int32_t> lengths;
    std::vector<int64_t> pointers;
    lengths.reserve(static_cast<size_t>(count));
    pointers.reserve(static_cast<size_t>(count));
    int64_t tokens = 0;
    int64_t next =
        contiguous ? token_starts[static_cast<size_t>(chunk)] * parent.bytes_per_token : 0;
    chunks.ForEachRow(chunk, [&](int64_t row) {
      const Span span = CheckedSpan(parent, row);
      const int64_t length = (span.end - span.begin) / parent.bytes_per_token;
      lengths.push_back(static_cast<int32_t>(length));
      pointers.push_back(contiguous ? next : span.begin);
      next += span.end - span.begin;
      tokens += length;
    });
    const auto put = [&](const auto& values, int64_t column) {
      const int64_t item = sizeof(values[0]);
      WriteAllAt(descriptor, values.data(), values.size() * sizeof(values[0]),
                 column + item * first, kWritingIndex);
    };
    put(lengths, lengths_at);
    put(pointers, pointers_at);
    for (int64_t i = 0; i < count; ++i) pointers[static_cast<size_t>(i)] = first + i;
    put(pointers, boundaries_at);
    num_tokens += tokens;
    if (drop_behind) chunks.DropPages(chunk);
  });
  WriteAllAt(descriptor, &total, sizeof(total), boundaries_at + 8 * total, kWritingIndex);
  return {total, num_tokens};
}

int64_t CopyChosenTokens(int source, int target, const IndexView& parent,
                         const ChosenRows& chosen, bool drop_behind, int threads) {
  const ChosenChunks chunks(parent, chosen, kCopyRows);
  const std::vector<int64_t> starts = chunks.Starts(threads, [&](int64_t row) {
    const Span span = CheckedSpan(parent, row);
    return span.end - span.begin;
  });
  ForEachChunk(chunks.count(), threads, [&](int64_t chunk) {
    RangeCopier copier(source, target, starts[static_cast<size_t>(chunk)]);
    Span range = {0, 0};
    chunks.ForEachRow(chunk, [&](int64_t row) {
      const Span span = CheckedSpan(parent, row);
      if (span.begin == range.end) {
        range.end = span.end;
        return;
      }
      if (range.end > range.begin) copier.Add(range);
      range = span;
    });
    if (range.end > range.begin) copier.Add(range);
    copier.Flush();
    if (drop_behind) chunks.DropPages(chunk);
  });
  return starts.back();
}

int64_t FirstDifference(const Sequences& left, int64_t first, const Sequences& right,
                        const int64_t* right_rows, int64_t count) {
  if (left.index.bytes_per_token != right.index.bytes_per_token ||
      left.index.bytes_per_token < 1 || first < 0 || count > left.index.count - first) {
    throw std::invalid_argument("rows " + std::to_string(first) + " to " +
                                std::to_string(first + count) + " of " +
                                std::to_string(left.index.count) + ", tokens of " +
                                std::to_string(left.index.bytes_per_token) + " and " +
                                std::to_string(right.index.bytes_per_token) + " bytes");
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = right_rows[i];
    if (row < 0 || row >= right.index.count) {
      throw std::invalid_argument("row " + std::to_string(row) + " of " +
                                  std::to_string(right.index.count));
    }
    const Span mine = CheckedSpan(left.index, first + i), other = CheckedSpan(right.index, row);
    const int64_t size = mine.end - mine.begin;
    if (size != other.end - other.begin ||
        std::memcmp(left.bin + mine.begin, right.bin + other.begin, static_cast<size_t>(size))) {
      return i;
    }
  }
  return -1;
}

}  // namespace miniplm
