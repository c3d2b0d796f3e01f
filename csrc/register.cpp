// ptv2_fast._C: an empty Python module; importing it registers the operators for CPU tensors.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "attention.h"
#include "dispatch.h"
#include "elementwise.h"
#include "micro.h"

namespace {

using Forward = ptv2::WithOptions<&ptv2::prefix_attention_forward>;
using Backward = ptv2::WithOptions<&ptv2::prefix_attention_backward>;

std::string cpu_capability() { return ptv2::cpu_level().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptv2, CPU, m) {
  m.impl("prefix_attention_forward", TORCH_BOX(&Forward::call));
  m.impl("prefix_attention_backward", TORCH_BOX(&Backward::call));
  m.impl("prefix_attention_forward_cpp", TORCH_BOX(&Forward::call));
  m.impl("prefix_attention_backward_cpp", TORCH_BOX(&Backward::call));
  m.impl("bias_activation", TORCH_BOX(&ptv2::bias_activation));
  m.impl("bias_activation_backward", TORCH_BOX(&ptv2::bias_activation_backward));
  m.impl("gated_activation", TORCH_BOX(&ptv2::gated_activation));
  m.impl("gated_activation_backward", TORCH_BOX(&ptv2::gated_activation_backward));
  m.impl("dropout_add_norm", TORCH_BOX(&ptv2::dropout_add_norm));
  m.impl("dropout_add_norm_backward", TORCH_BOX(&ptv2::dropout_add_norm_backward));
  m.impl("norm_from_stats", TORCH_BOX(&ptv2::norm_from_stats));
  m.impl("dropout_add", TORCH_BOX(&ptv2::dropout_add));
  m.impl("dropout_backward", TORCH_BOX(&ptv2::dropout_backward));
  m.impl("rotate_", TORCH_BOX(&ptv2::rotate_));
  m.impl("micro_exp", TORCH_BOX(&ptv2::micro_exp));
  m.impl("micro_dropout", TORCH_BOX(&ptv2::micro_dropout));
  m.impl("micro_pack", TORCH_BOX(&ptv2::micro_pack));
}

STABLE_TORCH_LIBRARY_IMPL(ptv2, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
