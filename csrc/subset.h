// The files of a subset: a stock Megatron .idx file whose sequences are chosen rows of a parent
// index and whose pointers lead into the parent's .bin, so that no token is copied; or into a .bin
// of its own with just the chosen tokens.
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

// A choice of rows: bit r % 8 of byte r / 8 says whether row r is chosen.
struct ChosenRows {
  const uint8_t* bits;
  int64_t num_rows;
};

struct WrittenIndex {
  int64_t num_rows;
  int64_t num_tokens;
};

// Writes the index of the chosen rows into the empty file `descriptor` with up to `threads` threads
// (each writes its own part of every column, in order) and bounded memory. With `contiguous`, the
// pointers are those of a .bin that holds just the chosen sequences, back to back; otherwise they
// are the parent's. `drop_behind` gives pages of a file-mapped parent index back once they are read.
//
// Throws std::invalid_argument, with the offending numbers, unless every chosen sequence lies
// inside the .bin; std::system_error if a write fails. What was written then is no complete file.
WrittenIndex WriteMaskedIndex(int descriptor, const IndexView& parent, const ChosenRows& chosen,
                              bool contiguous, bool drop_behind, int threads);

// Copies the tokens of the chosen rows from the parent's .bin into the empty file `target`, back to
// back, with up to `threads` threads, and returns their bytes. Adjacent sequences are one range;
// long ranges are copied inside the kernel where the file system can, short ones are gathered from
// large reads into large writes. Throws std::invalid_argument for a sequence outside the .bin,
// std::system_error if reading or writing fails or the .bin ends early.
int64_t CopyChosenTokens(int source, int target, const IndexView& parent,
                         const ChosenRows& chosen, bool drop_behind, int threads);

// An index and the .bin that it describes, both in memory (or mapped).
struct Sequences {
  IndexView index;
  const unsigned char* bin;
};

// The first i in [0, count) where sequence first + i of `left` and sequence right_rows[i] of
// `right` differ in length or in a byte; -1 if all are equal. Throws std::invalid_argument for rows
// that are not there, sequences outside their .bin, and tokens of different sizes.
int64_t FirstDifference(const Sequences& left, int64_t first, const Sequences& right,
                        const int64_t* right_rows, int64_t count);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_SUBSET_H_
