#pragma once
#include "arguments.hpp"

int gather(const Gather&);
int overwrite(const Overwrite&);
int weakest(const Weakest&);
