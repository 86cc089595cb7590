#pragma once
#include "arguments.hpp"

int find_places(const FindPlaces&);
