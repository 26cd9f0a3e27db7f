// How many data races ThreadSanitizer has reported so far in this process; 0 without it.
#pragma once

int num_races();
