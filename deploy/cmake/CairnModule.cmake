# How every target of the tree is made: one folder, one target, its sources listed.

add_library(cairn_options INTERFACE)
target_compile_options(cairn_options INTERFACE -Wall -Wextra -Wnon-virtual-dtor -Wshadow-uncaptured-local -Wno-unused-parameter
                       -fstack-protector-strong -fcf-protection)
target_compile_definitions(cairn_options INTERFACE _GLIBCXX_ASSERTIONS)
target_include_directories(cairn_options INTERFACE "${PROJECT_SOURCE_DIR}")
if(CAIRN_WERROR)
  target_compile_options(cairn_options INTERFACE -Werror)
endif()
if(CAIRN_SANITIZE)
  # Protobuf and RocksDB are not instrumented: container-overflow and vptr checks across that border report falsely. The other
  # three take a quarter of the build, and what they find ends under the address sanitizer too.
  target_compile_options(cairn_options INTERFACE -fsanitize=${CAIRN_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all
                         -fno-sanitize=vptr,null,object-size,pointer-overflow)
  target_link_options(cairn_options INTERFACE -fsanitize=${CAIRN_SANITIZE})
else()
  target_compile_definitions(cairn_options INTERFACE $<$<NOT:$<CONFIG:Debug>>:_FORTIFY_SOURCE=2>)
  target_link_options(cairn_options INTERFACE -Wl,-z,relro,-z,now)
endif()

# cairn_module(NAME SOURCES a.cc ... [DEPS target ...])
#   A static library cairn_NAME. Includes are written from the top of the tree: #include "storage/disk/disk.h".
function(cairn_module name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(cairn_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(cairn_${name} PUBLIC cairn_options ${ARG_DEPS})
endfunction()

# cairn_program(NAME SOURCES ... DEPS ...): an executable called NAME, in the top of the build folder's bin/.
# The target `programs` builds them all, and nothing of the tests.
add_custom_target(programs)
function(cairn_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE cairn_options ${ARG_DEPS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
  add_dependencies(programs ${name})
endfunction()

# cairn_subdirectories(a b c): one add_subdirectory each.
function(cairn_subdirectories)
  foreach(dir ${ARGN})
    add_subdirectory(${dir})
  endforeach()
endfunction()
