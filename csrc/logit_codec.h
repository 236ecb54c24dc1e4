// Kept logits of some positions as few bits: ids and log-probs, position by position.
//
// Layout, n positions, little-endian (docs/logit_store.md says it again for readers):
//   counts   n LEB128 numbers: entries of each position
//   top      float32 of each position that has entries: the highest log-prob as it is decoded
//   range    of each position with two entries or more: highest minus lowest, the upper 16 bits of
//            a float32, rounded up
//   bits     of each position in turn, the least significant bit of a byte first, and then zeros up
//            to a whole byte:
//              ids, by binary interpolative coding in [0, vocab): the middle one (entry k / 2 of k)
//                in minimal binary within what its neighbours leave, then those below, those above
//              of two entries or more: 5 bits r, then for each the level i, 0 the lowest and
//                2^bits - 1 the highest: i >> r zeros and a one (nothing if r = bits), then the low
//                r bits of i. The log-prob is top - (2^bits - 1 - i) * range / (2^bits - 1).
// With bits = 32 there are no tops, ranges and levels: after the bits come the log-probs, float32.
//
// `top` is chosen such that the decoded probabilities of a position sum to what the given ones do.

#ifndef MEGATRON_MINIPLM_CSRC_LOGIT_CODEC_H_
#define MEGATRON_MINIPLM_CSRC_LOGIT_CODEC_H_

#include <cstdint>
#include <vector>

namespace miniplm {

inline constexpr int kExactBits = 32;

// Entries of `positions` positions end to end; ids ascend within each.
struct KeptLogits {
  const uint32_t* counts;
  const int32_t* ids;
  const float* log_probs;
  int64_t positions;
  int64_t entries;  // of all positions
};

// The layout above. std::invalid_argument: bits other than 1 to 16 and 32; counts that do not add
// up to `entries` or exceed `vocab`; ids outside [0, vocab) or not ascending; a log-prob that is
// not finite.
std::vector<uint8_t> EncodeLogits(const KeptLogits& logits, int64_t vocab, int bits);

// What the same arguments gave `data`; arrays of `positions`, `entries` and `entries` numbers are
// filled. Any bytes are safe: std::invalid_argument where they are not what EncodeLogits writes.
void DecodeLogits(const uint8_t* data, int64_t size, int64_t vocab, int bits, int64_t positions,
                  int64_t entries, uint32_t* counts, int32_t* ids, float* log_probs);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_LOGIT_CODEC_H_
