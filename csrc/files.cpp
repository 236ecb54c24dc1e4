#include "files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

namespace miniplm {
namespace {

// Repeats step(data, size, offset), which is read or write and returns what it did, until all is
// done.
template <typename Byte, typename Step>
void Repeat(Byte* data, size_t size, int64_t offset, const char* doing, const Step& step) {
  while (size > 0) {
    const ssize_t done = step(data, size, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      const std::string early = done < 0 ? "" : ": the file ended early";
      throw std::system_error(done < 0 ? errno : EIO, std::generic_category(), doing + early);
    }
    data += done;
    offset += done;
    size -= static_cast<size_t>(done);
  }
}

}  // namespace

void WriteAll(int descriptor, const void* data, size_t size, const char* doing) {
  Repeat(static_cast<const char*>(data), size, 0, doing,
         [descriptor](const char* from, size_t count, int64_t) {
           return ::write(descriptor, from, count);
         });
}

void WriteAllAt(int descriptor, const void* data, size_t size, int64_t offset, const char* doing) {
  if (size == 0) return;
  Repeat(static_cast<const char*>(data), size, offset, doing,
         [descriptor](const char* from, size_t count, int64_t at) {
           return ::pwrite(descriptor, from, count, at);
         });
  StartWriteback(descriptor, offset, static_cast<int64_t>(size));
}

void ReadAllAt(int descriptor, void* data, size_t size, int64_t offset, const char* doing) {
  Repeat(static_cast<char*>(data), size, offset, doing,
         [descriptor](char* to, size_t count, int64_t at) {
           return ::pread(descriptor, to, count, at);
         });
}

void StartWriteback(int descriptor, int64_t offset, int64_t size) {
#ifdef SYNC_FILE_RANGE_WRITE
  ::sync_file_range(descriptor, offset, size, SYNC_FILE_RANGE_WRITE);
#else
  static_cast<void>(descriptor), static_cast<void>(offset), static_cast<void>(size);
#endif
}

void StartReading(int descriptor, int64_t offset, int64_t size) {
#ifdef POSIX_FADV_WILLNEED
  ::posix_fadvise(descriptor, offset, size, POSIX_FADV_WILLNEED);
#else
  static_cast<void>(descriptor), static_cast<void>(offset), static_cast<void>(size);
#endif
}

}  // namespace miniplm
