// What the module `_C` has of prompt tuning.
#pragma once

#include <pybind11/pybind11.h>

void bind_prompt(pybind11::module_& m);
