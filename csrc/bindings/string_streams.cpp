// String streams, compiled into the library. Some of their symbols in libstdc++ (3.4.26, 3.4.29)
// are newer than what a manylinux_2_28 wheel may need, and they cannot be avoided: torch's headers
// of the stable ABI use them.
#include <sstream>

#ifdef __GLIBCXX__
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
#endif
