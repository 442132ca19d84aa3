"""Values to be given in place of good ones, as source text. Whether they are wrong, the contract says."""

from __future__ import annotations

OBJECTS = (
    "None",
    "'x'",
    "[1.0]",
    "[[1.0]]",
    "1.0",
    "3",
    "np.ones((2, 3))",
    "Anything()",
    "BadClass()",
)
OBJECTS += ("BadEqual()", "BadBool()", "torch.Tensor", "(1.0, 2.0)", "{}", "np.float32(1)", "lambda: 0")
NUMBERS = (
    *("0.0", "-0.0", "0"),
    *("inf", "-inf", "nan", "-1.0", "-1e-30", "10**400", "-10**400", "2**63", "-2**63", "2**1024", "1e308", "5e-324"),
    *("'1'", "'0.5'", "'19'", "''", "b'1'", "bytearray(b'1')", "np.str_('1')", "True", "False", "np.bool_(True)"),
    *(
        "1j",
        "np.complex64(1)",
        "None",
        "[0.5]",
        "(0.5,)",
        "{}",
        "np.array([0.5, 0.5])",
        "np.array([0.5])",
        "np.array(0.5)",
    ),
    *("np.array('0.5')", "np.array(True)", "np.array(1j)", "np.float64('nan')", "np.float32('inf')", "np.float16(-1)"),
    *("np.longdouble('1e4000')", "np.uint64(2**63)", "np.datetime64('2020-01-01')", "np.timedelta64(1)"),
    *("Decimal('0.5')", "Decimal('NaN')", "Decimal('sNaN')", "Decimal('1e999')", "Decimal('-Infinity')"),
    *("Fraction(1, 3)", "Fraction(10**400)", "Fraction(-1, 3)", "IntSubclass(10**400)", "FloatSubclass('nan')"),
    *("torch.tensor(0.5)", "torch.tensor([0.5])", "torch.tensor([[0.5]])", "torch.tensor(nan)", "torch.tensor(1)"),
    *(
        "torch.tensor(True)",
        "torch.tensor(1j)",
        "on_meta(torch.tensor(0.5))",
        "two(torch.tensor(0.5))",
        "torch.tensor([])",
    ),
    *("torch.tensor(0.5).requires_grad_()", "torch.float32", "float", "GoodFloat()", "BadFloat()", "BadClass()"),
    *("BadEqual()", "HostileFloat(0.5)", "Anything()", "lambda: 0.5"),
)
WORDS = (
    *("'none'", "'Mean'", "''", "'mean '", "None", "True", "False", "0", "2.0", "b'mean'", "['mean']", "('mean',)"),
    *("np.array(['mean', 'sum'])", "np.array('mean')", "np.str_('mean')", "np.str_('zero')", "torch.ones(2)", "{}"),
    *("np.ones(3)", "BadEqual()", "BadBool()", "Anything()", "nan", "StrSubclass('no')"),
)
PAIRS = (
    *(
        "'19'",
        "'ab'",
        "(1,)",
        "(0.1, 1, 2.0)",
        "()",
        "(20.0, 0.1)",
        "(-0.1, 2.0)",
        "(nan, 2.0)",
        "(0.1, nan)",
        "(0, 0)",
    ),
    *("(inf, inf)", "20.0", "{0.1: 1, 20.0: 2}", "{0.1, 20.0}", "('0.1', '20')", "(True, 20)", "(None, 20)"),
    *(
        "(0.1, None)",
        "(0.1, 10**400)",
        "(-10**400, 1)",
        "np.array([0.1, 20.0])",
        "torch.tensor([0.1, 20.0])",
    ),
    *("(BadFloat(), 1.0)", "(1j, 2.0)", "range(1, 3)", "b'12'", "((0.1, 20.0),)", "(0.1, HostileFloat(20.0))"),
    *("np.ones((2, 2))", "(0.1, torch.tensor(20.0))", "(0.1, -inf)"),
    *(
        "(Decimal('0.1'), 20)",
        "BadBool()",
        "BadEqual()",
        "(BadEqual(), 1.0)",
        "(0.1, torch.ones(2))",
        "True",
        "Anything()",
    ),
)
DIVERGENCES = (
    *(
        "'jss'",
        "''",
        "'alpha:x'",
        "'alpha:nan'",
        "'alpha:inf'",
        "'alpha:1e400'",
        "'alpha:'",
        "'alpha'*1000",
        "3",
        "None",
    ),
    *("['js']", "b'js'", "fd.Divergence", "lambda r: r", "True", "BadEqual()", "BadClass()"),
    *("StrSubclass('js')", "np.array('js')", "torch.ones(2)", "'js\\x00'", "'J S'", "'\\ud800'"),
)
HISTOGRAMS = (
    *("torch.ones(10)", "Anything()", "3", "fd.RatioHistogram", "torch.nn.Linear(1, 1)", "'histogram'", "BadClass()"),
    *("fd.RatioHistogram(0, 1).to('meta')", "BadBool()", "True", "{}", "torch.nn.Module()"),
)
GROUPS = ("3", "'world'", "Anything()", "True", "[]", "BadBool()", "torch.distributed")
FLAGS = ("1", "0", "'no'", "None", "BadBool()", "torch.ones(2)", "np.bool_(True)", "np.ones(2)", "[]", "Anything()")
COUNTS = (
    "0",
    "-1",
    "2.5",
    "True",
    "None",
    "'3'",
    "10**30",
    "np.int64(3)",
    "IntSubclass(3)",
    "nan",
    "[3]",
    "Fraction(3)",
)
COUNTS += ("BadFloat()", "torch.tensor(3)", "torch.ones(2, 2)", "torch.ones(0)", "torch.ones(3).requires_grad_()")
COUNTS += (
    "torch.ones(3, dtype=torch.int64)",
    "torch.ones(3).to_sparse()",
    "two(torch.ones(3))",
    "on_meta(torch.ones(3))",
)

DTYPES = ("int64", "int32", "uint8", "bool", "complex64", "complex128", "complex32", "float8_e4m3fn", "float8_e8m0fnu")
DTYPES += ("uint16", "uint4", "bits8", "float4_e2m1fn_x2", "quint8", "float64", "float16")
REFUSED = (
    "sparse",
    "sparse_rows",
    "sparse_columns",
    "mkldnn",
    "nested",
    "nested_strided",
    "quantized",
    "uninitialized",
)
REFUSED += ("on_meta", "on_meta")
