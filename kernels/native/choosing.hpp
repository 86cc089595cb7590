#pragma once
#include "arguments.hpp"

int best_slots(const BestSlots&);
int page_slots(const PageSlots&);
int listed_slots(const ListedSlots&);
bool reused_slots(const ReusedSlots&);
