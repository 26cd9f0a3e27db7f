// What code for the current GPU this build carries.
#pragma once

namespace deep_ep::dev::cuda {

struct CompiledCode {
    bool exists = false;         // false: every launch on this GPU would fail
    bool has_bulk_copy = false;  // what prim::has_bulk_copy() says in kernels on this GPU
};

// Of the current device. Asks the loader and launches nothing.
CompiledCode find_compiled_code();

}  // namespace deep_ep::dev::cuda
