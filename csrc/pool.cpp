#include "pool.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>

#include "memory.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

namespace quire {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kLooksPerClock = 64;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks until `ready()` or until kSpin has passed; says whether it became ready.
template <class Ready>
bool spin(Ready ready) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int look = 0; look < kLooksPerClock; ++look) {
      if (ready()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

Pool::Pool(int threads) : scratch_(static_cast<std::size_t>(std::max(1, threads))) {
  for (int thread = 1; thread < this->threads(); ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_.store(true);
  bell_.fetch_add(1);
  bell_.notify_all();
  for (auto& worker : workers_) worker.join();
  for (auto& scratch : scratch_) std::free(scratch.data);
  for (auto& memory : unlent_) std::free(memory.data);
}

// The smallest that is large enough; if none is, the largest is exchanged for one that is.
Scratch Pool::borrow(std::size_t bytes) {
  Scratch memory;
  {
    std::lock_guard lock(lending_);
    const auto better = [bytes](const Scratch& one, const Scratch& other) {
      const bool fits = one.size >= bytes, other_fits = other.size >= bytes;
      if (fits != other_fits) return fits;
      return fits ? one.size < other.size : one.size > other.size;
    };
    const auto best = std::min_element(unlent_.begin(), unlent_.end(), better);
    if (best != unlent_.end()) {
      memory = *best;
      unlent_.erase(best);
    }
  }
  if (memory.data != nullptr && memory.size >= bytes) return memory;
  std::free(memory.data);
  const std::size_t size = (bytes / 4096 + 1) * 4096;
  return {allocate(static_cast<int64_t>(size)).release(), size};
}

void Pool::give_back(Scratch memory) noexcept {
  std::lock_guard lock(lending_);
  try {
    unlent_.push_back(memory);
  } catch (const std::bad_alloc&) {
    std::free(memory.data);
  }
}

void Pool::run(int64_t num_tasks, Task task, const void* context, std::size_t scratch_bytes) {
  if (num_tasks <= 0) return;
  std::lock_guard turn(turn_);
  reserve(scratch_bytes);
  if (num_tasks == 1 || workers_.empty()) {
    for (int64_t index = 0; index < num_tasks; ++index) task(context, index, 0);
    return;
  }
  // Close the last call before its description changes.
  const uint64_t call = (job_.load(std::memory_order_relaxed) >> 32) + 1;
  job_.store((call << 32) | kClosed);
  task_.store(task, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  num_tasks_.store(num_tasks, std::memory_order_relaxed);
  num_done_.store(0, std::memory_order_relaxed);
  job_.store(call << 32);
  bell_.fetch_add(1);
  if (num_asleep_.load() > 0) bell_.notify_all();
  claim_tasks(call, 0);
  const auto all_done = [&] { return num_done_.load(std::memory_order_acquire) == num_tasks; };
  if (spin(all_done)) return;
  for (int64_t done = num_done_.load(); done != num_tasks; done = num_done_.load()) num_done_.wait(done);
}

void Pool::claim_tasks(uint64_t call, int thread) {
  uint64_t job = job_.load(std::memory_order_acquire);
  while ((job >> 32) == (call & 0xffffffffu)) {
    const Task task = task_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const int64_t num_tasks = num_tasks_.load(std::memory_order_relaxed);
    const auto index = static_cast<int64_t>(job & 0xffffffffu);
    if (index >= num_tasks) return;
    if (!job_.compare_exchange_weak(job, job + 1, std::memory_order_acq_rel)) continue;
    task(context, index, thread);
    if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_tasks) num_done_.notify_one();
    job = job_.load(std::memory_order_acquire);
  }
}

bool Pool::wait_for_call(uint32_t& seen) {
  const auto rang = [&] { return bell_.load(std::memory_order_acquire) != seen; };
  if (!spin(rang)) {
    num_asleep_.fetch_add(1);
    while (bell_.load() == seen) bell_.wait(seen);
    num_asleep_.fetch_sub(1);
  }
  seen = bell_.load(std::memory_order_acquire);
  return !stop_.load(std::memory_order_acquire);
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  while (wait_for_call(seen)) claim_tasks(job_.load(std::memory_order_acquire) >> 32, thread);
}

void Pool::reserve(std::size_t bytes) {
  for (auto& scratch : scratch_) {
    if (scratch.size >= bytes) continue;
    std::free(scratch.data);
    scratch = {};
    const std::size_t size = (bytes + 4095) / 4096 * 4096;
    scratch.data = allocate(static_cast<int64_t>(size)).release();
    scratch.size = size;
  }
}

int default_threads() {
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) threads = CPU_COUNT(&cpus);
  std::ifstream quota("/sys/fs/cgroup/cpu.max");
  std::string limit;
  double period = 0;
  if (quota >> limit >> period && limit != "max" && period > 0) {
    threads = std::min(threads, static_cast<int>(std::stod(limit) / period + 0.5));
  }
#endif
  return std::max(1, threads);
}

}  // namespace quire
