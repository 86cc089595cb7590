#pragma once
#include "arguments.hpp"

int best_slots(const BestSlots&);
int page_slots(const PageSlots&);
bool reused_slots(const ReusedSlots&);
