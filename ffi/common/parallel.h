// Loops over XLA's CPU thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

namespace dsv4 {

// Runs body(begin, end) for ranges that cover [0, count), in any order or at once; `grain` of them
// are worth a thread. What a range computes does not depend on how they are cut.
using ParallelLoop = std::function<void(int64_t count, int64_t grain,
                                        const std::function<void(int64_t, int64_t)>& body)>;

// Calls fn(begin, end) for consecutive ranges that cover [0, count), each at least `grain` long but
// the last. `Pool` has num_threads() and Schedule(task), as ffi::ThreadPool. The calling thread
// works too and waits only for ranges that were begun, never for the pool to get round to a task:
// so a pool whose threads are all inside handlers cannot deadlock. `fn` must not throw.
template <typename Pool, typename Fn>
void ParallelFor(Pool& pool, int64_t count, int64_t grain, const Fn& fn) {
  const int64_t ranges =
      std::min<int64_t>(pool.num_threads() + 1, count / std::max<int64_t>(grain, 1));
  if (ranges <= 1) {
    if (count > 0) fn(int64_t{0}, count);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto state = std::make_shared<State>();  // outlives tasks that start after the last range is done
  const Fn* body = &fn;
  auto work = [state, body, ranges, count] {
    for (int64_t i; (i = state->next.fetch_add(1)) < ranges;) {
      const int64_t begin = count * i / ranges, end = count * (i + 1) / ranges;
      (*body)(begin, end);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < ranges; ++i) {
    auto task = work;
    pool.Schedule(std::move(task));
  }
  work();
  while (state->done.load(std::memory_order_acquire) < ranges) std::this_thread::yield();
}

}  // namespace dsv4
