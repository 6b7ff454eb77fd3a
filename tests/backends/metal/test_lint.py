"""The lint for Metal sources: each rule fires on its line, and not on what Metal allows."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tests.backends.metal.host import lint

# rule → (what Metal rejects, what it allows). Each line of the first is a finding of its own.
RULES = {
    "not-in-metal": (
        """
        double f(float x);
        float g() { goto end; }
        float h() { return 1.0L; }
        long long wide(int x);
        float n() { return *new float; }
        float e() { throw 1; }
        struct V { virtual void f() thread; };
        float s(float x) { return std::exp(x); }
        thread_local int counter();
        #define HALF double(0.5)
        """,
        """
        // double, goto
        float f(float x) { return 1.0 * x + 0.5f + 2e-6 - 1.5h; }
        struct S { S() = delete; int news, retry; };
        /* try
           throw */ long g(unsigned long x);
        """,
    ),
    "after-metal-3.1": (
        """
        void f() { atomic_thread_fence(mem_flags::mem_device); }
        kernel void k(device coherent float* x) {}
        """,
        "void f() { threadgroup_barrier(mem_flags::mem_device); }",
    ),
    "lambda": (
        """
        float f(float x) { auto g = [&](float y) { return x + y; }; return g(x); }
        float f(float x) { return apply(x, [](float y) { return y; }); }
        """,
        """
        [[max_total_threads_per_threadgroup(256)]] kernel void k(device int* x [[buffer(0)]]) { x[0] = (x)[2]; }
        float f(thread float (&a)[4]) { int b[2] = {0, 1}; return a[b[0]] + g(a)[1]; }
        """,
    ),
    "no-address-space": (
        """
        float f(const float* p);
        void f(float& x);
        template <typename T> void f(vec<T, 4>* p);
        template <typename T> T f(const T* p);
        void f(device float* p) { float* q = p; }
        struct S { int a; }; void g(S& s);
        void f(float (&row)[8]);
        kernel void k(device float* x) { auto& y = x[0]; }
        """,
        """
        float f(const device float* p, thread float& x, float threadgroup* q, constant int& n);
        template <typename T> T f(const constant T* p, threadgroup vec<T, 4>* q);
        float f(float a, float b) { return float(a) * b + a * (float)b + (a && b) + (int(a) & 3); }
        struct S { int a; }; void g(thread S& s, threadgroup float (&row)[8]);
        float f(float x) { return T(*reinterpret_cast<thread float*>(&x)); }
        """,
    ),
    "pointer-cast": (
        """
        void f(device float* p) { auto q = (threadgroup float*)p; }
        void f(device float* p) { auto q = (const device float4*)(p + 4); }
        """,
        """
        void f(device float* p) { auto q = reinterpret_cast<const device float4*>(p); }
        void f(device float* p, float x) { float y = (float)x; g((device float*)0 == p); }
        """,
    ),
    "threadgroup-variable": (
        """
        void f() { threadgroup float x[8]; }
        float f(float y) { if (y > 0) { threadgroup float x; } return y; }
        """,
        """
        [[kernel]] void k(device float* y) { threadgroup float x[8], z; threadgroup float* p = x; }
        kernel void k() { { threadgroup int n[2][3]; } }
        void f(threadgroup float* x) { threadgroup float* y = x + 1; }
        """,
    ),
    "static-variable": (
        "void f() { static int calls = 0; }",
        "static float g(float x) { static constant constexpr int m = 4; return static_cast<int>(x); }",
    ),
    "program-variable": (
        """
        constexpr int N = 4;
        const float table[2] = {1, 2};
        namespace a { float x; }
        struct S { static constexpr int rows = 8; };
        """,
        """
        constant constexpr int N = 4;
        constant float table[2] = {1, 2};
        #define CONST static constant constexpr const
        CONST float a = 1;
        struct S { int rows; static constexpr constant int columns = 8; enum { A = 1 }; float f(int x = 3); };
        template <typename T, int M = 4> float f(int x = N) { constexpr int local = 3; int y; return local; }
        using namespace metal;
        typedef float real;
        using V = vec<float, 4>;
        bool operator<=(S a, S b) { bool both = true; return both; }
        """,
    ),
    "recursion": (
        """
        int f(int n) { return n ? f(n - 1) : 0; }
        int even(int n) { return n ? odd(n - 1) : 1; } int odd(int n) { return even(n); }
        """,
        """
        template <int N> int f() { return f<N - 1>(); }
        float exp(float x) { return metal::exp(x); }
        int g(int n) { return h(n); } int h(int n) { return n; }
        """,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    rejected, allowed = RULES[rule]
    for line, text in enumerate(rejected.split("\n"), 1):
        if text.strip():
            findings = lint("\n" * (line - 1) + text, "bad.metal")
            assert {(f.file, f.line) for f in findings if f.rule == rule} == {("bad.metal", line)}, text
    assert [str(f) for f in lint(allowed)] == []


def test_lines_follow_line_directives():
    (finding,) = lint('int a();\n#line 10 "b.metal"\n\ndouble x();\n', "a.metal")
    assert str(finding).startswith("b.metal:11: `double`")


def test_macros_keep_their_lines():
    source = "#define F(x) \\\n  double(x) + \\\n  (x)\nint a();\ngoto b;\n"
    assert {f.line for f in lint(source)} == {1, 5}


@pytest.mark.slow
def test_what_apple_ships_has_no_findings():
    """MLX's own Metal headers compile, so what the lint says of them is wrong, but for what is listed here."""
    kernels = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels"
    sources = [path for path in sorted(kernels.rglob("*.h")) if "nax" not in path.name]  # nax: Metal 4
    assert len(sources) > 50
    findings = [f for path in sources for f in lint(path.read_text(), path.name)]
    same_space_casts = [f for f in findings if f.rule == "pointer-cast"]
    behind_version_checks = [f for f in findings if f.rule == "after-metal-3.1"]
    macro_of_another_file = [f for f in findings if f.file == "fft.h" and f.rule == "program-variable"]
    assert len(findings) == len(same_space_casts) + len(behind_version_checks) + len(macro_of_another_file)
    assert {f.file for f in behind_version_checks} <= {"logging.h", "binary_ops.h", "masked_scatter.h"}
