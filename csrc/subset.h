// Writes the view index of a subset: a stock Megatron .idx file whose sequences are chosen rows of
// a parent index and whose pointers lead into the parent's .bin, so that no token is copied.
//
// Layout (little-endian), for K chosen rows, one sequence a document, 20 K + 42 bytes:
//   9 bytes magic | uint64 version | uint8 dtype code | uint64 K | uint64 K + 1 |
//   int32[K] lengths, tokens | int64[K] pointers, bytes into .bin | int64[K + 1] 0, 1, ..., K

#ifndef MEGATRON_MINIPLM_CSRC_SUBSET_H_
#define MEGATRON_MINIPLM_CSRC_SUBSET_H_

#include <cstdint>

namespace miniplm {

// A parent index as it lies in its mapped file. An .idx header has 34 bytes, so both arrays may be
// unaligned: they are addressed as bytes.
struct IndexView {
  const unsigned char* lengths;   // int32[count], tokens
  const unsigned char* pointers;  // int64[count], bytes into .bin
  int64_t count;
  int64_t bin_bytes;  // size of the .bin
  int64_t bytes_per_token;
  uint8_t dtype_code;  // written to the new header as it is
};

// Writes the view index of `rows` at the file position of `descriptor` in blocks of bounded size
// and returns how many tokens the rows have. The caller owns the descriptor.
//
// Throws std::invalid_argument, with the offending numbers, unless rows ascend strictly, lie in
// [0, count), and every chosen sequence lies inside the .bin; std::system_error if a write fails.
// What was written before a throw is not a complete file.
int64_t WriteViewIndex(int descriptor, const IndexView& parent, const int64_t* rows,
                       int64_t num_rows);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_SUBSET_H_
