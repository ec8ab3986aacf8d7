#include <nanobind/nanobind.h>

#include <stdexcept>
#include <vector>

#include "backend.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace quire {
namespace {

// Weights as one Python object, which keeps the lists alive that it was made of.
struct MoeBlock {
  std::vector<Expert> experts;
  MoeWeights weights{};

  MoeBlock(const PackedWeight& router, const nb::list& gate, const nb::list& up, const nb::list& down, int64_t top_k,
           bool renormalize) {
    if (up.size() != gate.size() || down.size() != gate.size()) throw std::invalid_argument("number of experts");
    for (std::size_t i = 0; i < gate.size(); ++i) {
      experts.push_back({&nb::cast<PackedWeight&>(gate[i]), &nb::cast<PackedWeight&>(up[i]),
                         &nb::cast<PackedWeight&>(down[i])});
      check(experts.back(), router);
    }
    const auto num_experts = static_cast<int64_t>(experts.size());
    if (router.n != num_experts || top_k < 1 || top_k > num_experts) throw std::invalid_argument("number of experts");
    weights = {&router, experts.data(), num_experts, top_k, renormalize};
  }
  MoeBlock(const MoeBlock&) = delete;
  MoeBlock& operator=(const MoeBlock&) = delete;

  void check(const Expert& expert, const PackedWeight& router) const {
    const Expert& first = experts.front();
    for (const PackedWeight* inward : {expert.gate, expert.up}) {
      if (inward->k != router.k || inward->n != first.gate->n) throw std::invalid_argument("shape of an expert");
    }
    if (expert.down->n != router.k || expert.down->k != first.gate->n) throw std::invalid_argument("shape of an expert");
    if (expert.gate->format != expert.up->format || expert.gate->group_size != expert.up->group_size ||
        expert.gate->sub_size != expert.up->sub_size) {
      throw std::invalid_argument("gate and up differ in format");
    }
  }
};

}  // namespace

void bind_moe(nb::module_& m) {
  nb::class_<MoeMemory>(m, "MoeMemory", "What one engine's sparse blocks work in, one after the other.")
      .def(nb::init<>());
  nb::class_<MoeBlock>(m, "MoeWeights", "A router and its experts, as lists of packed weights.")
      .def(nb::init<const PackedWeight&, const nb::list&, const nb::list&, const nb::list&, int64_t, bool>(),
           "router"_a, "gate"_a, "up"_a, "down"_a, "top_k"_a, "renormalize"_a, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>());
  m.def("moe", [](Backend& backend, const MoeBlock& block, MoeMemory& memory, uintptr_t x, int64_t stride,
                  uintptr_t residual, uintptr_t out, int64_t t) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<uint16_t*>(address); };
    backend.moe.moe(backend.pool,
                    {&block.weights, t, at(x), stride, at(residual), at(out), block.weights.router->k, &memory});
  }, "backend"_a, "weights"_a, "memory"_a, "x"_a, "stride"_a, "residual"_a, "out"_a, "t"_a,
     nb::call_guard<nb::gil_scoped_release>(), "bf16 [t, e] to dense bf16 [t, e]; residual 0: none.");
}

}  // namespace quire
