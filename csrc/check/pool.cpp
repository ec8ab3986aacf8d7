#include <atomic>
#include <numeric>
#include <thread>

#include "check/check.hpp"

namespace quire::check {
namespace {

struct Counts {
  Pool* pool;
  std::vector<std::atomic<int>> done;
  std::atomic<bool> scratch_is_right{true};
};

void count(const void* context, int64_t task, int thread) {
  auto& counts = *static_cast<Counts*>(const_cast<void*>(context));
  counts.done[static_cast<std::size_t>(task)].fetch_add(1, std::memory_order_relaxed);
  auto* own = reinterpret_cast<int64_t*>(counts.pool->scratch(thread));
  for (int index = 0; index < 8; ++index) own[index] = task;
  for (int index = 0; index < 8; ++index) {
    if (own[index] != task) counts.scratch_is_right = false;
  }
}

void run_many(Pool& pool, unsigned seed, int calls) {
  Random random(seed);
  for (int call = 0; call < calls; ++call) {
    const int64_t tasks = random.integer(0, 40);
    Counts counts{&pool, std::vector<std::atomic<int>>(static_cast<std::size_t>(tasks))};
    pool.run(tasks, count, &counts, static_cast<std::size_t>(random.integer(64, 9000)));
    for (const auto& done : counts.done) expect(done == 1, "each task runs once before run returns", "pool");
    expect(counts.scratch_is_right, "a thread's scratch is its own", "pool");
  }
}

}  // namespace

void check_pool() {
  for (const int threads : {1, 2, 3, 7}) {
    Pool pool(threads);
    run_many(pool, static_cast<unsigned>(threads), 3000);
    // Two callers take turns.
    std::thread other([&] { run_many(pool, 100, 1000); });
    run_many(pool, 200, 1000);
    other.join();
  }
  for (int times = 0; times < 50; ++times) Pool idle(4);
}

}  // namespace quire::check
