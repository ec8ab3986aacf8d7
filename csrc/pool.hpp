// Threads that share the tasks of one kernel call.
//
// A call's tasks are numbered; threads claim the next number until none is left, so a core that is slow today does
// less. What a task computes must not depend on who runs it. Between calls the workers watch for the next one for some
// microseconds, then sleep: a step's calls follow each other closely, and an idle engine takes no CPU at all.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

struct Scratch {
  std::byte* data = nullptr;
  std::size_t size = 0;
};

class Pool {
 public:
  using Task = void (*)(const void* context, int64_t task, int thread);

  // `threads` counts the caller, who works too.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(scratch_.size()); }

  // Runs tasks 0..num_tasks-1 and returns when all are done. Calls from several threads take turns. Tasks must not
  // throw and must not call `run`. Each thread gets `scratch_bytes` of memory of its own (`scratch`); std::bad_alloc
  // if there is not that much, before any task has run.
  void run(int64_t num_tasks, Task task, const void* context, std::size_t scratch_bytes = 0);

  // Memory for one call, kept from call to call: fresh pages cost more than the work on them. Aligned to 4096, and at
  // least `bytes`. Throws std::bad_alloc. Any thread may ask.
  Scratch borrow(std::size_t bytes);
  void give_back(Scratch memory) noexcept;

  // The running thread's memory, aligned to 4096; what an earlier task left there is still in it.
  std::byte* scratch(int thread) const { return scratch_[static_cast<std::size_t>(thread)].data; }

 private:
  // `job_` holds the call's number in its upper and the next task in its lower half. A claim is a compare-exchange on
  // both, so a worker that overslept a call can never take a task of the next one by its old description.
  static constexpr uint64_t kClosed = 0xffffffffu;

  void work(int thread);
  void claim_tasks(uint64_t call, int thread);
  bool wait_for_call(uint32_t& seen);
  void reserve(std::size_t bytes);

  std::mutex turn_, lending_;
  std::vector<Scratch> unlent_;
  std::vector<Scratch> scratch_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint64_t> job_{kClosed};
  std::atomic<Task> task_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> num_tasks_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<int> num_asleep_{0};
  std::atomic<bool> stop_{false};
};

// How many threads a machine is good for: the cores this process may use, less where the cgroup's quota is smaller.
int default_threads();

}  // namespace quire
