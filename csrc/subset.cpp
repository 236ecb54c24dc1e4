#include "subset.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Megatron's index files are little-endian, and these are written as they lie in memory"
#endif

namespace miniplm {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr uint64_t kVersion = 1;
// Rows a block: 512 KiB of int64, which stays in the second-level cache between fill and write.
constexpr int64_t kBlockRows = int64_t{1} << 16;

template <typename T>
T Load(const unsigned char* array, int64_t index) {
  T value;
  std::memcpy(&value, array + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

void WriteAll(int descriptor, const void* data, size_t size) {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(descriptor, next, size);
    if (written < 0) {
      if (errno == EINTR) continue;
      throw std::system_error(errno, std::generic_category(), "writing a subset's index");
    }
    next += written;
    size -= static_cast<size_t>(written);
  }
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
  WriteAll(descriptor, header, sizeof(header));
}

// Calls fill(i, &element) for i in [0, count) and writes the elements block by block.
template <typename T, typename Fill>
void WriteColumn(int descriptor, int64_t count, const Fill& fill) {
  std::vector<T> block(static_cast<size_t>(std::min(count, kBlockRows)));
  for (int64_t start = 0; start < count; start += kBlockRows) {
    const int64_t size = std::min(kBlockRows, count - start);
    for (int64_t i = 0; i < size; ++i) block[static_cast<size_t>(i)] = fill(start + i);
    WriteAll(descriptor, block.data(), static_cast<size_t>(size) * sizeof(T));
  }
}

[[noreturn]] void RefuseRow(const int64_t* rows, int64_t at, int64_t count) {
  const std::string row = "row " + std::to_string(rows[at]) + " at position " + std::to_string(at);
  if (rows[at] < 0 || rows[at] >= count) {
    throw std::invalid_argument(row + " is outside an index of " + std::to_string(count) +
                                " sequences");
  }
  throw std::invalid_argument(row + " does not come after row " + std::to_string(rows[at - 1]) +
                              ": rows must ascend strictly");
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

}  // namespace

int64_t WriteViewIndex(int descriptor, const IndexView& parent, const int64_t* rows,
                       int64_t num_rows) {
  if (parent.bytes_per_token < 1) {
    throw std::invalid_argument("a token of " + std::to_string(parent.bytes_per_token) + " bytes");
  }
  WriteHeader(descriptor, parent.dtype_code, num_rows);
  int64_t num_tokens = 0;
  int64_t previous = -1;
  // The first column checks everything, so that the later ones only copy.
  WriteColumn<int32_t>(descriptor, num_rows, [&](int64_t i) {
    const int64_t row = rows[i];
    if (row <= previous || row >= parent.count) RefuseRow(rows, i, parent.count);
    previous = row;
    const int32_t length = Load<int32_t>(parent.lengths, row);
    const int64_t pointer = Load<int64_t>(parent.pointers, row);
    if (!Fits(pointer, length, parent)) RefuseSpan(row, pointer, length, parent);
    num_tokens += length;
    return length;
  });
  WriteColumn<int64_t>(descriptor, num_rows,
                       [&](int64_t i) { return Load<int64_t>(parent.pointers, rows[i]); });
  WriteColumn<int64_t>(descriptor, num_rows + 1, [](int64_t i) { return i; });
  return num_tokens;
}

}  // namespace miniplm
