#include <nanobind/nanobind.h>

#include <stdexcept>

#include "address.hpp"
#include "backend.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace quire {
namespace {

SampleCall call_of(uintptr_t logits, int64_t stride, int64_t s, int64_t v, int64_t max_top, uintptr_t results,
                   uintptr_t top_ids, uintptr_t top_logprobs) {
  SampleCall call{};
  call.logits = at<const float>(logits);
  call.stride = stride;
  call.s = s;
  call.v = v;
  call.max_top = max_top;
  call.results = at<SampleResult>(results);
  call.top_ids = at<int64_t>(top_ids);
  call.top_logprobs = at<float>(top_logprobs);
  return call;
}

void sample(Backend& backend, uintptr_t logits, int64_t stride, int64_t s, int64_t v, nb::bytes rows, uintptr_t ids,
            uintptr_t biases, int64_t max_top, uintptr_t results, uintptr_t top_ids, uintptr_t top_logprobs) {
  if (rows.size() != static_cast<std::size_t>(s) * sizeof(SampleRow)) throw std::invalid_argument("rows: wrong size");
  SampleCall call = call_of(logits, stride, s, v, max_top, results, top_ids, top_logprobs);
  call.rows = reinterpret_cast<const SampleRow*>(rows.c_str());
  call.ids = at<const int64_t>(ids);
  call.biases = at<const double>(biases);
  const nb::gil_scoped_release free;
  backend.sampling.sample(backend.pool, call);
}

void token_logprobs(Backend& backend, uintptr_t logits, int64_t stride, int64_t s, int64_t v, uintptr_t token_ids,
                    int64_t num_top, uintptr_t results, uintptr_t top_ids, uintptr_t top_logprobs) {
  for (int64_t row = 0; row < s; ++row) {
    const int64_t id = at<const int64_t>(token_ids)[row];
    if (id < 0 || id >= v) throw std::out_of_range("a token id is outside of the vocabulary");
  }
  const nb::gil_scoped_release free;
  backend.sampling.token_logprobs(backend.pool,
                                  call_of(logits, stride, s, v, num_top, results, top_ids, top_logprobs),
                                  at<const int64_t>(token_ids));
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("sample", &sample, "backend"_a, "logits"_a, "stride"_a, "s"_a, "v"_a, "rows"_a, "ids"_a, "biases"_a,
        "max_top"_a, "results"_a, "top_ids"_a, "top_logprobs"_a, "One token per row; `rows` are packed SampleRows.");
  m.def("token_logprobs", &token_logprobs, "backend"_a, "logits"_a, "stride"_a, "s"_a, "v"_a, "token_ids"_a,
        "num_top"_a, "results"_a, "top_ids"_a, "top_logprobs"_a, "IndexError for an id outside of the vocabulary.");
}

}  // namespace quire
