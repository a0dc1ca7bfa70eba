// The Python face: what was built, and hooks for tests. The only file that knows pybind11.
#include "cpu/dispatch.h"
#include "draft_index.h"
#include "gumbel.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

#define RGTG_STRING_(x) #x
#define RGTG_STRING(x) RGTG_STRING_(x)

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = "g++ " __VERSION__;
  info["torch"] = RGTG_STRING(RGTG_BUILD_TORCH);
#ifdef RGTG_CUDA_ARCHS
  info["cuda_archs"] = RGTG_STRING(RGTG_CUDA_ARCHS);
  info["nvcc"] = RGTG_STRING(RGTG_NVCC);
#else
  info["cuda_archs"] = pybind11::none();
  info["nvcc"] = pybind11::none();
#endif
  return info;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const rgtg::Philox4x32 out =
      rgtg::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

rgtg::DraftIndex* draft_index(int64_t order, int64_t capacity) {
  if (order < 1 || order > 64 || capacity < 1) {
    throw std::invalid_argument("order=" + std::to_string(order) +
                                ", capacity=" + std::to_string(capacity) +
                                "; pass an order from 1 to 64 and a capacity >= 1");
  }
  return new rgtg::DraftIndex(order, capacity);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of rgtg_fast; importing it registers torch.ops.rgtg_fast.*";
  m.def("build_info", &build_info, "Compilers, torch and CUDA architectures of this build.");
  m.def("philox4x32_10", &philox, "counter (4 words), key (2 words) -> 4 words");
  m.def("gumbel_from_word", &rgtg::gumbel_from_word, "32 random bits -> Gumbel noise");
  m.def("simd_level", &rgtg::simd_level_name, "Instruction set in use.");
  m.def("simd_levels", &rgtg::simd_levels, "Instruction sets this machine can run.");
  m.def("set_simd_level", &rgtg::set_simd_level, "Use a lower instruction set, for tests.");

  namespace py = pybind11;
  using rgtg::DraftIndex;
  py::class_<DraftIndex>(m, "DraftIndex",
                         "Guesses next tokens from what followed the same tokens before.")
      .def(py::init(&draft_index), py::arg("order") = 4, py::arg("capacity") = 1 << 18,
           "order: longest suffix counted; capacity: suffixes kept")
      .def("extend", &DraftIndex::extend, py::arg("row"), py::arg("ids"),
           "Tokens that follow in text `row`; its first call starts it.")
      .def("leave", &DraftIndex::leave, py::arg("row"), "Text `row` has ended.")
      .def("draft", &DraftIndex::draft, py::arg("row"), py::arg("n"), py::arg("position"),
           py::arg("seed"), py::arg("do_sample"), py::arg("ahead") = std::vector<int64_t>(),
           "Up to n guesses for what follows text `row` and `ahead`, from `position` of its answer "
           "on.")
      .def("__len__", &DraftIndex::size, "Suffixes known.");
}
