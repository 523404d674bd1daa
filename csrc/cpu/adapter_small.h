// The adapter's forward pass for a few rows: the weights are read as they lie. To pack them, as
// adapter_forward.cpp does for any number of rows, takes longer than the products of a few.
#pragma once

#include "adapter.h"

namespace pk {

// Whether a call is one of these.
bool is_small(const AdapterForward& call);
void adapter_forward_small(const AdapterForward& call);

}  // namespace pk
