//! The registry of services in scripts: `register web/a port=80 ttl=10s`, `register web/a tcp interval=5s session=7`, `heartbeat web/a`,
//! `deregister web/a token=3`, `drain web/a`, `undrain web/a`, `probed web/a token=3 term=1 critical why=down`, `guard web percent=50`.

use super::Said;
use tenure_machine::*;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let op = match said.verb {
        "register" => RegistryOp::Register(Box::new(register(said)?)),
        "deregister" => RegistryOp::Deregister(named(said)?),
        "heartbeat" => {
            RegistryOp::Heartbeat(Heartbeat { of: named(said)?, health: health(said), why: text(said, "why") })
        }
        "drain" | "undrain" => RegistryOp::Drain(Drain { of: named(said)?, draining: said.verb == "drain" }),
        "probed" => RegistryOp::Probed(Probed {
            of: named(said)?,
            term: said.number("term"),
            health: health(said),
            why: text(said, "why"),
        }),
        "guard" => {
            RegistryOp::Guard(ServiceGuard { service: said.plain(0)?.into(), percent: said.number("percent") as u32 })
        }
        _ => return None,
    };
    Some(op.into())
}

fn named(said: &Said<'_>) -> Option<InstanceRef> {
    let (service, instance) = said.plain(0)?.split_once('/')?;
    Some(InstanceRef { service: service.into(), instance: instance.into(), token: Revision(said.number("token")) })
}

fn text(said: &Said<'_>, name: &str) -> Box<str> {
    said.option(name).unwrap_or_default().into()
}

fn health(said: &Said<'_>) -> Health {
    match said.plain(1) {
        Some("critical") => Health::Critical,
        Some("warning") => Health::Warning,
        Some("draining") => Health::Draining,
        _ => Health::Passing,
    }
}

fn register(said: &Said<'_>) -> Option<Register> {
    let InstanceRef { service, instance, .. } = named(said)?;
    let or = |name: &str, default: u64| if said.option(name).is_some() { said.number(name) } else { default };
    let probe = match said.plain(1) {
        Some("tcp") => Some(Probe::Tcp),
        Some("http") => Some(Probe::Http(said.option("path").unwrap_or("/health").into())),
        Some("grpc") => Some(Probe::Grpc("".into())),
        _ => None,
    };
    let active = |probe| ActiveCheck {
        probe,
        port: said.number("check-port") as u32,
        interval_ms: said.option("interval").map_or(10_000, |_| said.ms("interval")),
        timeout_ms: 5_000,
        failures_before_critical: or("failures", 3) as u32,
        success_before_passing: 1,
    };
    let check = match (said.option("ttl"), probe) {
        (Some(_), _) => Check::Ttl(said.ms("ttl")),
        (None, Some(probe)) => Check::Active(active(probe)),
        (None, None) => Check::None,
    };
    let spec = InstanceSpec {
        address: said.option("address").unwrap_or("10.0.0.1").into(),
        port: or("port", 80) as u32,
        tags: said.option("tags").map_or(Vec::new(), |tags| tags.split(',').map(Into::into).collect()),
        meta: Vec::new(),
        weight: or("weight", 1) as u32,
        session: SessionId(said.number("session")),
        check,
        deregister_after_ms: said.option("after").map_or(600_000, |_| said.ms("after")),
    };
    Some(Register { service, instance, spec: Box::new(spec), replaces: Revision(said.number("replaces")) })
}

pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    match (what, rest) {
        ("services", []) => {
            let shown = machine.services(namespace, None, 100).iter().map(service).collect::<Vec<_>>();
            Some(format!("services [{}]", shown.join("; ")))
        }
        ("service", [name]) => {
            let Some(info) = machine.service(namespace, name) else { return Some(format!("no service {name}")) };
            let mut out = service(&info);
            for (id, one, kept) in machine.instances(namespace, name, None, 100) {
                let pulse =
                    machine.pulse(namespace, name, &id).map_or(String::new(), |at| format!(" pulse until {at}"));
                let leaves = one.leaves.map_or(String::new(), |at| format!(" leaves at {at}"));
                let kept = if kept { " kept" } else { "" };
                out += &format!(
                    "\n  {id} token={} revision={} {}:{} {:?} `{}` since {}{leaves}{pulse}{kept}",
                    one.token,
                    one.revision,
                    one.spec.address,
                    one.spec.port,
                    one.health(),
                    one.why,
                    one.since
                );
            }
            Some(out)
        }
        ("probed", []) => {
            let mut all: Vec<String> = Vec::new();
            let mut last: Option<ProbedInstance> = None;
            while let Some(next) = machine.probed_instances(last.as_ref(), 1).pop() {
                all.push(format!("{}: {}/{}", next.namespace.0, next.service, next.id));
                last = Some(next);
            }
            Some(format!("probed [{}]", all.join(", ")))
        }
        _ => None,
    }
}

fn service(info: &ServiceInfo) -> String {
    let HealthCounts { passing, warning, critical, draining } = info.counts;
    let guard = match (info.guard_percent, info.guarded) {
        (0, _) => String::new(),
        (percent, None) => format!(" guard={percent}%"),
        (percent, Some(since)) => format!(" guard={percent}% on since {since}"),
    };
    format!("{} index={} up={passing}+{warning} critical={critical} draining={draining}{guard}", info.name, info.index)
}
