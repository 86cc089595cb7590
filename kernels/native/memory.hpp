#pragma once
#include "arguments.hpp"

int prefer_large_pages(const Region&);
