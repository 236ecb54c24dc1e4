// One piece of work on several threads.

#ifndef MEGATRON_MINIPLM_CSRC_THREADS_H_
#define MEGATRON_MINIPLM_CSRC_THREADS_H_

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace miniplm {

// `threads`, or one a core for less than 1; no more than there are pieces of work.
inline int ThreadsFor(int threads, int64_t pieces) {
  if (threads < 1) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(pieces, 1)));
}

// Calls work(t) for t = 0 on this thread and for t up to `threads` - 1 on others, and waits for all.
// Where the system starts no more threads, those that run have to do: work must not count on any
// but the first. The first exception is thrown on when all have ended.
template <typename Work>
void RunOnThreads(int threads, const Work& work) {
  std::exception_ptr failure;
  std::mutex failing;
  const auto guarded = [&](int number) {
    try {
      work(number);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failing);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  try {
    for (int number = 1; number < threads; ++number) others.emplace_back(guarded, number);
  } catch (const std::system_error&) {
  }
  guarded(0);
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_THREADS_H_
