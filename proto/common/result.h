#pragma once

#include "cairn/result.h"  // the public header: one Result for the library and its users

#define CAIRN_CONCAT_(a, b) a##b
#define CAIRN_CONCAT(a, b) CAIRN_CONCAT_(a, b)
#define CAIRN_TRY_(tmp, ret, decl, expr)                 \
  auto tmp = (expr);                                     \
  if (!tmp) ret ::cairn::fail(::std::move(tmp).error()); \
  decl = *::std::move(tmp)
#define CAIRN_CHECK_(tmp, ret, expr) \
  if (auto tmp = (expr); !tmp) ret ::cairn::fail(::std::move(tmp).error())

/// TRY(auto x, f()): x is the value, or this function returns the error. CHECK_OK(f()): the same without a value.
/// CO_ the same inside a coroutine.
#define TRY(decl, expr) CAIRN_TRY_(CAIRN_CONCAT(try_, __LINE__), return, decl, expr)
#define CO_TRY(decl, expr) CAIRN_TRY_(CAIRN_CONCAT(try_, __LINE__), co_return, decl, expr)
#define CHECK_OK(expr) CAIRN_CHECK_(CAIRN_CONCAT(try_, __LINE__), return, expr)
#define CO_CHECK_OK(expr) CAIRN_CHECK_(CAIRN_CONCAT(try_, __LINE__), co_return, expr)
