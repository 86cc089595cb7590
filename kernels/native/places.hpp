#pragma once
#include "arguments.hpp"

int find_places(const FindPlaces&);
int rows_to_read(const RowsToRead&);
