import inspect
import json
import re

import httpx
import pytest

import meshkit
from meshkit import Backoff, CircuitBreaker, ConfigurationError, Fallback, Pipeline, Retry, Timeout
from meshkit.policies import config
from meshkit.policies.bulkhead import Bulkhead
from meshkit.policies.config import PARTS, Policies
from meshkit.policies.hedge import Hedge
from meshkit.policies.presets import messaging, standard
from meshkit.policies.rate_limiter import RateLimiter
from meshkit.policies.retry_budget import RetryBudget


@pytest.fixture
def toml(tmp_path):
    """Write a file, and have it read with an empty environment."""

    def read(text, **options):
        path = tmp_path / "policies.toml"
        path.write_text(text)
        return Policies.from_toml(path, **{"environ": {}, **options})

    return read


def part(pipeline, kind):
    return next((policy for policy in pipeline.policies if isinstance(policy, kind)), None)


def retry_of(policies, name="users"):
    return part(policies.pipeline(name), Retry)


def refused(make, *args, **options):
    with pytest.raises(ConfigurationError) as caught:
        make(*args, **options)
    return str(caught.value)


def test_the_example_of_the_module_loads(toml):
    """What its docstring shows is a file that can be read, and does what the comments say."""
    (example,) = re.findall(r"```toml\n(.*?)```", config.__doc__, re.DOTALL)
    policies = toml(example)
    assert ("user-service", "mailer") == policies.names
    assert 2 == retry_of(policies, "user-service").attempts
    assert None is part(policies.pipeline("user-service"), Bulkhead)
    assert ["circuit_breaker", "timeout"] == [step.kind for step in policies.pipeline("mailer").explain().steps]
    assert 2.0 == policies.pipeline("mailer").explain().seconds


def test_a_client_without_settings_is_the_preset(toml, clock):
    """An empty table names a client; it is what `standard` makes."""
    policies = toml("[clients.users]", clock=clock)
    ours = policies.pipeline("users").explain()
    assert standard("users", clock=clock).explain() == ours
    assert {"users": ours} == policies.explain()


def test_the_same_pipeline_each_time(toml):
    """Whoever asks for a client shares its breaker."""
    policies = toml("[clients.users]\n[clients.mail]")
    assert policies.pipeline("users") is policies.pipeline("users")
    assert policies.pipeline("users") is not policies.pipeline("mail")
    assert ("users", "mail") == policies.names


def test_defaults_are_overridden_key_by_key(toml):
    """A client's table names only what differs, in nested tables too."""
    policies = toml("""
        [defaults]
        attempt_timeout = "500ms"
        [defaults.retry]
        attempts = 4
        on = ["ConnectionError", "meshkit.AttemptTimeoutError"]
        backoff = {first = "50ms", most = 2}
        [clients.users.retry]
        attempts = 2
        backoff = {first = 0.2}
        [clients.mail]
        total = "1.5m"
        breaker = {open_for = "1m", ignore = ["KeyError"]}
        """)
    users, mail = retry_of(policies), retry_of(policies, "mail")
    assert (2, Backoff(first=0.2, most=2.0)) == (users.attempts, users.backoff)
    assert (4, Backoff(first=0.05, most=2.0)) == (mail.attempts, mail.backoff)
    assert (ConnectionError, meshkit.AttemptTimeoutError) == mail.on
    timeouts = [policy for policy in policies.pipeline("mail").policies if isinstance(policy, Timeout)]
    assert [(None, 90.0), (0.5, None)] == [(timeout.seconds, timeout.total) for timeout in timeouts]
    assert 60.0 == part(policies.pipeline("mail"), CircuitBreaker).open_for


def test_a_part_is_switched_off_and_on(toml):
    """`false` goes without; a table, or `true`, brings back what defaults have switched off."""
    policies = toml("""
        [defaults]
        retry = false
        bulkhead = false
        [clients.users]
        retry = {attempts = 2}
        [clients.mail]
        bulkhead = true
        total = false
        attempt_timeout = false
        breaker = false
        """)
    assert 2 == retry_of(policies).attempts
    assert None is part(policies.pipeline("users"), Bulkhead)
    assert [Bulkhead] == [type(policy) for policy in policies.pipeline("mail").policies]


def test_all_parts_can_be_had(toml, clock):
    """Fallback, hedge, rate limiter and budget have no default in the presets, or one that can be changed."""
    pipeline = toml(
        """
        [clients.users]
        fallback = {answer = [], name = "nobody", on = ["ConnectionError"]}
        hedge = {delay = "300ms"}
        rate_limiter = {permits = 10, per = "1s"}
        bulkhead = {limit = 3}
        budget = {ratio = 0.1}
        """,
        clock=clock,
    ).pipeline("users")
    assert [Timeout, Fallback, Retry, Hedge, CircuitBreaker, RateLimiter, Bulkhead, Timeout] == [
        type(policy) for policy in pipeline.policies
    ]
    assert 0.1 == part(pipeline, Retry).budget.ratio
    assert part(pipeline, Retry).budget is part(pipeline, Hedge).budget
    assert "users" == part(pipeline, CircuitBreaker).name


def test_without_a_budget(toml):
    """`budget = false` leaves retries unlimited by it."""
    assert None is retry_of(toml("[clients.users]\nbudget = false")).budget


async def test_everybody_is_answered_with_a_list_of_their_own(toml):
    """What one caller does to the answer does not reach the next."""
    pipeline = toml("[clients.users]\nretry = false\nfallback = {answer = [1]}").pipeline("users")

    async def fails():
        raise ConnectionError

    (await pipeline.call(fails)).append(2)
    assert [1] == await pipeline.call(fails)


def test_a_window_of_seconds_takes_the_place_of_one_of_calls(toml):
    """Of two ways to say the same, the client's own word holds."""
    policies = toml("[defaults.breaker]\nwindow = 50\n[clients.users.breaker]\nwindow_for = 30")
    described = part(policies.pipeline("users"), CircuitBreaker).describe()
    assert (None, 30.0) == (described["window"], described["window_for"])


def test_the_messaging_preset_is_not_given_retries_by_defaults(toml, clock):
    """What it leaves out on purpose comes back only where the client itself says so."""
    policies = toml(
        """
        [defaults]
        total = 5
        retry = {attempts = 4}
        [clients.users]
        [clients.payments]
        preset = "messaging"
        [clients.mail]
        preset = "messaging"
        retry = true
        """,
        clock=clock,
    )
    assert messaging("payments", clock=clock).explain() == policies.pipeline("payments").explain()
    assert (4, 4) == (retry_of(policies).attempts, retry_of(policies, "mail").attempts)


FILE = "[defaults.retry]\nattempts = 2\n[clients.user-service]\n[clients.mail.retry]\nattempts = 3"


@pytest.mark.parametrize(
    ("environ", "overrides", "users", "mail"),
    [
        ({}, None, 2, 3),
        ({"MESHKIT_POLICIES__DEFAULTS__RETRY__ATTEMPTS": "5"}, None, 5, 3),
        ({"MESHKIT_POLICIES__MAIL__RETRY__ATTEMPTS": "5"}, None, 2, 5),
        ({"MESHKIT_POLICIES__USER_SERVICE__RETRY__ATTEMPTS": " "}, None, 2, 3),
        (
            {"MESHKIT_POLICIES__USER_SERVICE__RETRY__ATTEMPTS": "5"},
            {"clients": {"user-service": {"retry": {"attempts": 6}}}},
            6,
            3,
        ),
        (
            {"MESHKIT_POLICIES__USER_SERVICE__RETRY__ATTEMPTS": "5"},
            {"defaults": {"retry": {"attempts": 6}}},
            5,
            3,
        ),
    ],
)
def test_argument_then_environment_then_file_then_preset(toml, environ, overrides, users, mail):
    """Of what is said of the client first, then of what is said of all. An empty variable is not set."""
    policies = toml(FILE, environ=environ, overrides=overrides)
    assert (users, mail) == (retry_of(policies, "user-service").attempts, retry_of(policies, "mail").attempts)


def test_variables_alone(monkeypatch):
    """Clients are named, or are those that variables speak of; each kind of value is read from text."""
    for key, value in {
        "PRESET": "standard",
        "TOTAL": "8s",
        "ATTEMPT_TIMEOUT": "off",
        "RETRY__ATTEMPTS": "5",
        "RETRY__ON": "ConnectionError, meshkit.AttemptTimeoutError",
        "RETRY__PATIENT": "true",
        "RETRY__BACKOFF__FIRST": "50ms",
        "RETRY__BACKOFF__JITTER": "equal",
        "BREAKER__FAILURE_RATE": "0.25",
        "BULKHEAD": "false",
        "ALLOW__JITTER_OFF": "a reason",
    }.items():
        monkeypatch.setenv(f"MESHKIT_POLICIES__USER_SERVICE__{key}", value)
    policies = Policies.from_env()
    assert ("user-service",) == policies.names
    pipeline = policies.pipeline("user-service")
    assert [Timeout, Retry, CircuitBreaker] == [type(policy) for policy in pipeline.policies]
    retry = part(pipeline, Retry)
    assert (5, True, Backoff(first=0.05, jitter="equal")) == (retry.attempts, retry.patient, retry.backoff)
    assert (ConnectionError, meshkit.AttemptTimeoutError) == retry.on
    assert 0.25 == part(pipeline, CircuitBreaker).failure_rate
    assert {"jitter-off": "a reason"} == pipeline.allow
    assert ("mail", "user-service") == Policies.from_env("mail", "user-service").names


def test_a_switch_in_a_variable_goes_before_a_key_of_the_same_part():
    """`RETRY=false` beside `RETRY__ATTEMPTS=5` goes without: switching off is what one does in a hurry."""
    environ = {"MESHKIT_POLICIES__MAIL__RETRY__ATTEMPTS": "5", "MESHKIT_POLICIES__MAIL__RETRY": "false"}
    assert None is retry_of(Policies.from_env(environ=environ), "mail")


def test_findings_are_allowed_with_a_reason(toml, caplog):
    """`allow` goes to the pipeline."""
    policies = toml("""
        [clients.allowed]
        total = 3
        allow = {"attempts-exceed-total" = "most answers come at once"}
        """)
    assert "most answers come at once" == policies.pipeline("allowed").explain().findings[0].allowed
    assert "attempts-exceed-total" not in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[client.users]", "client is nothing there is. Did you mean clients?"),
        ("clients = 3", "clients is 3: it is a table."),
        ("[clients]\nusers = 3", "clients.users is 3: it is a table."),
        ("[clients.users]\nretries = 3", "clients.users.retries is nothing there is. Did you mean retry?"),
        (
            "[clients.users.retry]\natempts = 3",
            "clients.users.retry.atempts is nothing there is. Did you mean attempts?",
        ),
        (
            "[clients.users.retry.backoff]\nfrist = 3",
            "clients.users.retry.backoff.frist is nothing there is. Did you mean first?",
        ),
        (
            "[clients.users.retry]\nbackoff = 3",
            "clients.users.retry.backoff is 3: it is a table.",
        ),
        ("[clients.users]\nretry = 3", "clients.users.retry is 3: it is a table, or false to go without"),
        ('[clients.users.retry]\nattempts = "3"', "clients.users.retry.attempts is '3': it is a whole number: 3."),
        ("[clients.users.retry]\nattempts = true", "clients.users.retry.attempts is True: it is a whole number"),
        ("[clients.users.retry]\npatient = 1", "clients.users.retry.patient is 1: it is true or false."),
        ("[clients.users.retry]\nattempts = 0", "clients.users.retry.attempts: attempts is how often to call"),
        ('[clients.users]\ntotal = "10 sec"', "clients.users.total is '10 sec': a length of time is"),
        ("[clients.users]\ntotal = [1]", "clients.users.total is [1]: it is a length of time"),
        ("[clients.users]\ntotal = inf", "clients.users.total is inf: it is how long a call may take, so above 0"),
        ("[clients.users]\nattempt_timeout = nan", "clients.users.attempt_timeout is nan: it is how long a call"),
        ("[clients.users]\ntotal = -1", "clients.users.total is -1: it is how long a call may take, so above 0"),
        ('[clients.users]\npreset = "massaging"', "it is 'standard' or 'messaging'. Did you mean messaging?\n"),
        ("[clients.users]\npreset = 3", "clients.users.preset is 3: it is 'standard' or 'messaging'.\n"),
        (
            '[clients.users.retry]\non = ["NoSuchError"]',
            "clients.users.retry.on is ['NoSuchError']: 'NoSuchError' is no",
        ),
        ('[clients.users.retry]\non = ["no_such.Error"]', "'no_such.Error' cannot be imported"),
        ('[clients.users.retry]\non = ["builtins.int"]', "'builtins.int' is no exception class"),
        ("[clients.users.retry]\non = []", "it lists exception classes by name"),
        (
            '[clients.users.breaker]\nfailure_rate = "half"',
            "clients.users.breaker.failure_rate is 'half': it is a number",
        ),
        ("[clients.users.breaker]\nfailure_rate = 50", "clients.users.breaker.failure_rate: failure_rate is a share"),
        ("[clients.users]\nhedge = true", "clients.users.hedge needs delay."),
        ("[clients.users]\nfallback = {name = 3}", "clients.users.fallback.name is 3: it is a text"),
        ('[clients.users]\nallow = {"jitter" = "x"}', "clients.users.allow.jitter: allow names 'jitter'"),
        (
            "[clients.users.breaker]\nwindow = 20\nwindow_for = 30",
            "clients.users.breaker.window_for: window counts calls and window_for counts seconds",
        ),
        ('[clients.""]', "clients has a table '', and a client's name is a text"),
        (
            "[clients.users]\nretry = false\nbudget = {ratio = 0.1}",
            "clients.users.budget bounds retries and hedges, and client 'users' has neither: leave it out.",
        ),
        (
            '[clients.users]\npreset = "messaging"\nbudget = true',
            "clients.users.budget bounds retries and hedges, and client 'users' has neither: leave it out.",
        ),
        ("[clients.users", "is no TOML"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(toml, tmp_path, text, says):
    """The file, the path of the key, what would be right, and the nearest key for a misspelt one."""
    error = refused(toml, text)
    assert says in f"{error}\n"
    assert "policies.toml" in error


def test_all_that_is_wrong_is_said_at_once(toml):
    """What is wrong in defaults once, not once a client; nothing is held back by what came before."""
    error = refused(
        toml,
        "[defaults.retry]\nattempts = 0\n[clients.users]\ntotl = 3\n[clients.mail.breaker]\nopen_for = -1",
        environ={"MESHKIT_POLICIES__USERS__TOTAL": "soon", "MESHKIT_POLICIES__MIAL__TOTAL": "3"},
    )
    lines = error.splitlines()
    assert "MK100  5 settings of policies cannot work:" == lines[0]
    assert 6 == len(lines)
    for wrong in ("defaults.retry.attempts", "clients.users.totl", "clients.mail.breaker.open_for", "__USERS__TOTAL"):
        assert 1 == error.count(wrong), wrong
    assert "MESHKIT_POLICIES__MIAL__TOTAL is about no client. Did you mean MAIL?" in error


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"MESHKIT_POLICIES__USERS": "3"}, "MESHKIT_POLICIES__USERS names no setting"),
        ({"MESHKIT_POLICIES__USERS__RETRY__ATEMPTS": "3"}, "Did you mean attempts?"),
        ({"MESHKIT_POLICIES__USERS__RETRY__ATTEMPTS": "3.5"}, "RETRY__ATTEMPTS is '3.5': it is a whole number"),
        ({"MESHKIT_POLICIES__USERS__RETRY__ATTEMPTS__MORE": "3"}, "ATTEMPTS__MORE is nothing there is."),
        (
            {"MESHKIT_POLICIES__USERS__RETRIES__ATTEMPTS": "3"},
            "RETRIES__ATTEMPTS is nothing there is. Did you mean retry?",
        ),
        ({"MESHKIT_POLICIES__USERS__RETRY__BACKOFF": "3"}, "it is a table"),
        (
            {"MESHKIT_POLICIES__USERS__TOTAL__S": "3"},
            "MESHKIT_POLICIES__USERS__TOTAL__S is nothing there is. total is one",
        ),
        ({"MESHKIT_POLICIES__USERS__ALLOW": "x"}, "__USERS__ALLOW names no finding. It ends like"),
        ({"MESHKIT_POLICIES__USERS__ALLOW__JITTER__OFF": "x"}, "__ALLOW__JITTER__OFF names no finding. It ends like"),
        ({"MESHKIT_POLICIES__USERS__BUDGET": "on", "MESHKIT_POLICIES__USERS__RETRY": "off"}, "__BUDGET bounds retries"),
        ({"MESHKIT_POLICIES____TOTAL": "3"}, "MESHKIT_POLICIES____TOTAL names no client. It begins like"),
        ({"MESHKIT_POLICIES__DEFAULT__TOTAL": "3"}, "__DEFAULT__TOTAL is about no client. Did you mean DEFAULTS?"),
        ({"MESHKIT_POLICIES__USERS__RETRY": "maybe"}, "it is a table, or false"),
        ({"MESHKIT_POLICIES__USERS__RETRY__ATTEMPTS": "0"}, "__RETRY__ATTEMPTS: attempts is how often to call"),
    ],
)
def test_a_variable_that_is_wrong_is_named(environ, says):
    """As a key of a file is."""
    assert says in refused(Policies.from_env, environ=environ)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Policies.from_mapping(None), "the mapping is None: it is a table."),
        (lambda: Policies.from_mapping([1]), "the mapping is [1]: it is a table."),
        (lambda: Policies.from_mapping({}, overrides=3), "overrides is 3: it is a table."),
        (lambda: Policies.from_mapping({}, environ=3), "environ is 3: it is the variables by name"),
        (lambda: Policies.from_mapping({}, clock=3), "clock is where the time comes from, and 3 is none."),
        (lambda: Policies.from_mapping({3: {}}), "3 is nothing there is. There is clients, defaults."),
        (lambda: Policies.from_mapping({"clients": {3: {}}}), "clients has a table 3, and a client's name is a text."),
        (lambda: Policies.from_mapping({"clients": {"a": {3: 1}}}), "clients.a.3 is nothing there is. There is allow,"),
        (
            lambda: Policies.from_mapping({"clients": {"a": {"retry": {3: 1}}}}),
            "clients.a.retry.3 is nothing there is.",
        ),
        (lambda: Policies.from_mapping({"clients": {"a": {"allow": {3: "x"}}}}), "allow names 3, and there is no such"),
        (lambda: Policies.from_env(3), "3 names no client: each name is a text of its own"),
        (lambda: Policies.from_env(["users", "mail"]), "['users', 'mail'] names no client: each name is a text"),
        (lambda: Policies.from_toml(3), "policies are read from a file by its path, not from 3."),
    ],
)
def test_what_is_no_table_or_no_name_is_said_to_be_none(make, says):
    """What comes from a program and not from a file can be anything; it is told what it should have been."""
    assert says in refused(make)


def test_a_budget_of_defaults_is_for_whom_it_may_concern():
    """It was not said of the client that has no retry, which is therefore no contradiction; a hedge draws on one too."""
    without = {"defaults": {"budget": {"ratio": 0.1}}, "clients": {"users": {"retry": False}}}
    assert None is retry_of(Policies.from_mapping(without, environ={}))
    hedged = {"clients": {"users": {"retry": False, "hedge": {"delay": 1}, "budget": {"ratio": 0.1}}}}
    assert 0.1 == part(Policies.from_mapping(hedged, environ={}).pipeline("users"), Hedge).budget.ratio


@pytest.mark.parametrize(
    ("defaults", "client", "says"),
    [
        ({"bulkhead": {"limit": 0}}, {"preset": "messaging"}, "defaults.bulkhead.limit: limit is how many calls"),
        ({"hedge": {"delay": -1}}, {"preset": "messaging"}, "defaults.hedge.delay: delay is how many seconds"),
        ({"retry": {"attempts": 0}}, {"retry": False}, "defaults.retry.attempts: attempts is how often to call"),
        ({"retry": {"backoff": {"first": -1}}}, {"retry": False}, "defaults.retry.backoff.first: first and most are"),
        ({"breaker": {"open_for": -1}}, {"breaker": {"open_for": 3}}, "defaults.breaker.open_for: open_for is how"),
        ({"fallback": {"name": "a,b"}}, {"fallback": False}, "defaults.fallback.name: name goes into a header"),
        ({"rate_limiter": {"per": -1}}, {"rate_limiter": False}, "defaults.rate_limiter.per: per is the seconds"),
        ({"budget": {"ratio": -1}}, {"preset": "messaging"}, "defaults.budget.ratio: ratio is how many retries"),
    ],
    ids=str,
)
def test_defaults_that_no_client_uses_are_checked(defaults, client, says):
    """A value that cannot work is told now, and not to whoever adds the client that would use it."""
    assert says in refused(Policies.from_mapping, {"defaults": defaults, "clients": {"users": client}}, environ={})
    assert says in refused(Policies.from_mapping, {"defaults": defaults}, environ={})


@pytest.mark.parametrize(
    ("defaults", "client"),
    [
        ({"hedge": {"attempts": 3}}, {"hedge": {"delay": 1, "attempts": 2}}),
        ({"rate_limiter": {"per": 2}}, {"rate_limiter": {"permits": 1, "per": 1}}),
        ({"fallback": {"name": "empty"}}, {"fallback": {"answer": 1, "name": "one"}}),
        ({"breaker": {"slow_rate": 0.5, "open_for": 10}}, {"breaker": {"slow_after": 1, "open_for": 3}}),
        ({"breaker": {"slow_rate": 0.5}}, {"breaker": {"slow_after": 1, "slow_rate": 0.4}}),
        ({"breaker": {"min_calls": 30, "open_for": 10}}, {"breaker": {"window": 50, "open_for": 3}}),
    ],
    ids=str,
)
def test_defaults_need_not_be_enough_by_themselves(defaults, client):
    """What they leave open, and what makes sense together with what the client says, is the client's to say."""
    assert ("users",) == Policies.from_mapping({"defaults": defaults, "clients": {"users": client}}, environ={}).names


def test_an_override_of_a_client_that_is_not_there_is_refused_where_it_looks_misspelt(toml):
    """It would make a second client, and what it was to change would stay as it is. A name like no other is a further
    client, and where the file names none, all are."""
    error = refused(toml, "[clients.user-service]", overrides={"clients": {"user-servce": {"total": 3}}})
    assert "overrides: clients.user-servce is about no client. Did you mean user-service?" in error
    assert "Did you mean users?" in refused(Policies.from_env, "users", environ={}, overrides={"clients": {"user": {}}})
    added = toml("[clients.user-service]", overrides={"clients": {"mail": {}}})
    assert ("user-service", "mail") == added.names
    assert ("mail",) == toml("", overrides={"clients": {"mail": {}}}).names
    # Who gives a client that name means it.
    environ = {"MESHKIT_POLICIES__DEFAULT__TOTAL": "20"}
    assert ("default",) == Policies.from_env("default", environ=environ).names


def test_two_names_that_are_one_variable_are_refused(toml):
    """Nobody could tell which of them a variable is about."""
    assert "both USER_SERVICE" in refused(toml, "[clients.user-service]\n[clients.user_service]")
    assert "both DEFAULTS" in refused(toml, "[clients.defaults]")


def test_a_file_that_is_not_there_is_named(tmp_path):
    """And a name that nobody has set is answered with the near ones."""
    assert "nowhere.toml" in refused(Policies.from_toml, tmp_path / "nowhere.toml")
    policies = Policies.from_mapping({"clients": {"user-service": {}}}, environ={})
    assert "Did you mean user-service? A client is known by its table: [clients.user-servce]" in refused(
        policies.pipeline, "user-servce"
    )


def test_every_keyword_of_a_policy_can_be_set_or_is_python_only():
    """The table of keys and the signatures agree, so that a new keyword is not forgotten here."""
    python_only = {
        "fallback": {"last_good"},
        "retry": {"retry", "wait", "stop", "on_result", "discard", "budget", "clock"},
        "budget": {"name", "clock"},
        "hedge": {"budget", "discard", "clock"},
        "breaker": {"name", "failed", "listeners", "clock"},
        "rate_limiter": {"name", "clock"},
        "bulkhead": {"name", "clock"},
    }
    classes = {
        "fallback": Fallback,
        "retry": Retry,
        "budget": RetryBudget,
        "hedge": Hedge,
        "breaker": CircuitBreaker,
        "rate_limiter": RateLimiter,
        "bulkhead": Bulkhead,
    }
    for name, kind in classes.items():
        assert set(inspect.signature(kind).parameters) == set(PARTS[name]) | python_only[name], name
    assert set(inspect.signature(Backoff).parameters) == set(PARTS["retry"]["backoff"])


async def test_a_pipeline_from_a_file_guards_a_client(toml, clock):
    """What it is for: the pipeline goes wherever a pipeline goes."""
    policies = toml("[clients.users.retry]\nattempts = 2\non = ['ConnectionError']", clock=clock)

    class Users:
        calls = 0

        async def get(self):
            self.calls += 1
            raise ConnectionError

    users = meshkit.wrap(Users(), policies.pipeline("users"))
    with pytest.raises(ConnectionError):
        await users.get()
    assert 2 == users.calls
    assert isinstance(policies.pipeline("users"), Pipeline)
    json.dumps({name: one.as_dict() for name, one in policies.explain().items()})


async def test_a_pipeline_from_a_file_goes_into_an_http_client(toml, clock, caplog):
    """`pipeline=` is all there is to write; the table of HTTP decides what is tried again, and nothing is found amiss."""
    policies = toml("[clients.users]\nretry = {attempts = 2}", clock=clock)
    answers = [httpx.Response(503), httpx.Response(200, text="ok")]

    def answer(request):
        return answers.pop(0)

    inner = httpx.MockTransport(answer)
    pipeline = policies.pipeline("users")
    async with meshkit.httpx.client(
        "users", base_url="http://users", pipeline=pipeline, inner=inner, clock=clock
    ) as users:
        assert "ok" == (await users.get("/1")).text
    assert {"success": 1, "failure": 1} == {
        key: count for key, count in part(pipeline, CircuitBreaker).counts.items() if count
    }
    assert "pipeline 'users'" not in caplog.text


def test_what_a_retry_cannot_be_made_of_hides_no_other_problem():
    """A wait that cannot work stands beside everything else that is wrong, with its path: also in the standard preset,
    which has a retry of its own."""
    said = refused(
        Policies.from_mapping,
        {
            "clients": {
                "pay": {"retry": {"backoff": {"factor": 0.5}}, "breaker": {"windw": 3}},
                "mail": {"preset": "messaging", "retry": {"backoff": {"most": -1}}},
                "b": {"total": -1},
            }
        },
        environ={},
    )
    assert "4 settings" in said
    assert "clients.pay.retry.backoff.factor: factor makes each wait longer" in said
    assert "clients.pay.breaker.windw is nothing there is. Did you mean window?" in said
    assert "clients.mail.retry.backoff.most: first and most are seconds to wait" in said
    assert "clients.b.total is -1" in said


def test_an_error_that_cannot_be_imported_is_named_with_its_path(tmp_path, monkeypatch):
    """A name relative to nothing, and a module that fails while it is imported or asked, are settings that cannot work."""
    (tmp_path / "raises_at_import.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "raises_when_asked.py").write_text("def __getattr__(name):\n    raise LookupError(name)")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"a": "..x.Y", "b": "raises_at_import.X", "c": ".OSError", "d": "raises_when_asked.X", "e": "no..such.X"}
    said = refused(
        Policies.from_mapping,
        {"clients": {client: {"retry": {"on": [name]}} for client, name in names.items()}},
        environ={"MESHKIT_POLICIES__A__BREAKER__IGNORE": "OSError, ..x.Y"},
    )
    assert "6 settings" in said
    assert "clients.a.retry.on is ['..x.Y']: '..x.Y' is no name from the top" in said
    assert "clients.b.retry.on is ['raises_at_import.X']" in said
    assert "cannot be imported: RuntimeError: no licence." in said
    assert "clients.c.retry.on is ['.OSError']: '.OSError' is no name from the top" in said
    assert "'raises_when_asked.X' cannot be imported: LookupError: " in said
    assert "clients.e.retry.on is ['no..such.X']" in said
    assert "MESHKIT_POLICIES__A__BREAKER__IGNORE is 'OSError, ..x.Y'" in said


def test_keys_that_are_no_texts_are_nothing_there_is():
    """A mapping may have keys that no file has."""
    said = refused(
        Policies.from_mapping,
        {
            "x": {1: 2},
            1: 2,
            "clients": {1: {}, "a": {1: 2, "retry": {2: 3, "backoff": {(1, 2): 2}}, "breaker": {None: 1}}},
        },
        environ={},
    )
    for one in (
        "x is nothing there is.",
        "1 is nothing there is.",
        "clients has a table 1, and",
        "clients.a.1 is nothing there is.",
        "clients.a.retry.2 is nothing there is.",
        "clients.a.retry.backoff.(1, 2) is nothing there is.",
        "clients.a.breaker.None is nothing there is.",
    ):
        assert one in said


@pytest.mark.parametrize("number", [10**18, -(10**18), 10**400, 10**5000], ids=["19", "-19", "401", "5001"])
def test_whole_numbers_beyond_any_count_are_refused_with_their_path(number):
    """Python converts and writes no number of any length; such a one is a setting that cannot work, and no other is
    hidden by it."""
    said = refused(
        Policies.from_mapping,
        {
            "clients": {
                "a": {
                    "retry": {"attempts": number},
                    "breaker": {"window": number},
                    "bulkhead": {"limit": [number]},
                    "total": -1,
                }
            }
        },
        environ={},
    )
    assert "4 settings" in said
    assert re.search(r"clients\.a\.retry\.attempts is .*: it is a whole number of up to 18 digits\.", said)
    assert re.search(r"clients\.a\.breaker\.window is .*: it is a whole number of up to 18 digits\.", said)
    assert re.search(r"clients\.a\.bulkhead\.limit is .*: it is a whole number: 3\.", said)
    assert len(said) < 1200


@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_that_no_float_holds_are_refused_with_their_path(digits):
    """A length of time or a share of hundreds of digits is a setting that cannot work."""
    number = 10**digits
    said = refused(
        Policies.from_mapping,
        {"clients": {"a": {"total": number, "budget": {"ratio": number}, "breaker": number}}},
        environ={},
    )
    assert re.search(r"clients\.a\.total is .*: it is a number that no clock and no policy counts to\.", said)
    assert re.search(r"clients\.a\.budget\.ratio is .*: it is a number that no clock", said)
    assert re.search(r"clients\.a\.breaker is .*: it is a table, or false", said)


def test_a_whole_number_in_a_variable_may_have_zeros_in_front_and_no_end():
    """What counts is the number: a million zeros in front of a 4 leave it a 4, and a million digits are too many."""
    key = "MESHKIT_POLICIES__USERS__RETRY__ATTEMPTS"
    for text, attempts in (("0" * 5000 + "4", 4), ("+4", 4), ("9" * 18, 10**18 - 1)):
        assert attempts == retry_of(Policies.from_env(environ={key: text, f"{key[:-15]}TOTAL": "false"})).attempts
    for text in ("9" * 19, "-" + "9" * 19, "9" * 5000):
        said = refused(Policies.from_env, environ={key: text})
        assert f"{key} is '{text[:19]}" in said
        assert "it is a whole number of up to 18 digits" in said
        assert len(said) < 400


def test_a_file_whose_numbers_or_tables_have_no_end_is_no_toml(toml):
    """What the parser stumbles over, whatever it raises, is told of the file."""
    assert "policies.toml is no TOML: " in refused(toml, "[clients.a]\ntotal = " + "9" * 5000)
    assert "policies.toml is no TOML: " in refused(toml, "a = " + "[" * 100_000)


def test_variables_that_are_no_texts_are_told_or_left_alone():
    """`environ` may be any mapping: of what is not meshkit's, nothing is read."""
    assert "MESHKIT_POLICIES__A__TOTAL is 3: a variable is a text." in refused(
        Policies.from_env, environ={1: "2", "PORT": 80, "MESHKIT_POLICIES__A__TOTAL": 3}
    )
    assert ("a",) == Policies.from_env("a", environ={1: "2", "PORT": 80}).names
