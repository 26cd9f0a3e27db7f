// Words that kernels write and the host reads, in memory that both see.
#pragma once

#include <atomic>

namespace deep_ep {

// The other side of a kernel's release. A template, so that the word is what its owner says: a word of another width would
// be read into a temporary first, and not atomically.
template <class Word> Word load_acquire(const Word& word) { return std::atomic_ref(const_cast<Word&>(word)).load(); }

}  // namespace deep_ep
