// Data races that ThreadSanitizer reported in this process; none without it.
#pragma once

int num_races();

// So many of them were planted. A test binary fails when there were others.
void expect_races(int count);
