// What ThreadSanitizer has reported so far in this process. Without it there are none.
#pragma once

namespace deep_ep::testing {

int num_races();

// The process ends as a failure when there are more reports than its tests have expected. Tests of planted faults
// call this with the number that they have just caused.
void expect_races(int count);

}  // namespace deep_ep::testing
