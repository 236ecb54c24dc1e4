// Whole reads and writes of file descriptors: every failure is a std::system_error that says what
// was being done, with the errno.

#ifndef MEGATRON_MINIPLM_CSRC_FILES_H_
#define MEGATRON_MINIPLM_CSRC_FILES_H_

#include <cstddef>
#include <cstdint>

namespace miniplm {

// Writes at the descriptor's own offset.
void WriteAll(int descriptor, const void* data, size_t size, const char* doing);

// Writes at `offset`, and sends it on its way to the disk.
void WriteAllAt(int descriptor, const void* data, size_t size, int64_t offset, const char* doing);

// Reads from `offset`; an early end of the file is an error of the medium (EIO).
void ReadAllAt(int descriptor, void* data, size_t size, int64_t offset, const char* doing);

// Sends what was written of a range to the disk without waiting, so that little is left for fsync
// to wait for; a size of 0 is all of it from `offset`. A hint: where the system has no such call,
// fsync does it all.
void StartWriteback(int descriptor, int64_t offset, int64_t size);

// Asks for a range that will be read soon, and returns at once. A hint.
void StartReading(int descriptor, int64_t offset, int64_t size);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_FILES_H_
