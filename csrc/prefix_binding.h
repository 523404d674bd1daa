// What the module `_C` has of prefix attention.
#pragma once

#include <pybind11/pybind11.h>

void bind_prefix(pybind11::module_& m);
