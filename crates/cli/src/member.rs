//! `tenure member`: who belongs to the cluster, and every change of that.
//!
//! Members are named by their name or by their id, as `tenure member list` shows it. A command that takes a member in prints the line
//! that starts it.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::members_client::MembersClient;
use tonic::transport::{Channel, Endpoint};

use crate::common::{Common, Failure, Output, OutputArg, exit, print_table};

/// How long the server waits until something is carried out, and a little more.
const SERVER_WAIT: Duration = Duration::from_secs(6);

#[derive(Debug, Args)]
pub(crate) struct MemberArgs {
    #[command(subcommand)]
    command: MemberCommand,
}

#[derive(Debug, Subcommand)]
enum MemberCommand {
    /// List the members as the one that is asked sees them
    List {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Take a new member in, and print the line that starts it
    ///
    /// It is a learner until it has caught up, and then a voter by itself.
    Add {
        name: String,
        /// Where the other members will find it
        #[arg(long, value_name = "HOST:PORT")]
        peer: String,
        /// It stays a learner until `tenure member promote`
        #[arg(long)]
        learner: bool,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make a learner a voter as soon as it has caught up
    Promote {
        #[arg(value_name = "ID|NAME")]
        member: String,
        /// Return at once instead of when it is done
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Remove a member for good; its process stops by itself
    Remove {
        #[arg(value_name = "ID|NAME")]
        member: String,
        /// Return at once instead of when it is done
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Take a new member in for a dead one, and print the line that starts it
    ///
    /// The old one is removed in the very change that makes the new one a voter.
    Replace {
        #[arg(value_name = "ID|NAME")]
        member: String,
        new_name: String,
        /// Where the other members will find the new one; it may be the address of the old one
        #[arg(long, value_name = "HOST:PORT")]
        peer: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Tell the other members another address of a member that does not run
    Update {
        #[arg(value_name = "ID|NAME")]
        member: String,
        #[arg(long, value_name = "HOST:PORT")]
        peer: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Hand leadership to a member, or to whichever is furthest
    MoveLeader {
        #[arg(value_name = "ID|NAME")]
        member: Option<String>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Print the line that starts a member which was added through the etcd API
    Token {
        #[arg(value_name = "ID|NAME")]
        member: String,
        #[command(flatten)]
        output: OutputArg,
    },
}

pub(crate) async fn run(common: &Common, args: MemberArgs) -> anyhow::Result<ExitCode> {
    let door = Door { common };
    match args.command {
        MemberCommand::List { output } => print_list(&door.list().await?, output.output),
        MemberCommand::Add { name, peer, learner, output } => {
            let request = v1::MemberAddRequest { name, peer, learner };
            let answer = door
                .change(|mut c| {
                    let r = request.clone();
                    async move { c.add(r).await }
                })
                .await?;
            print_added(&answer, None, output.output);
        }
        MemberCommand::Replace { member, new_name, peer, output } => {
            let gone = door.find(&member).await?;
            let request = v1::MemberReplaceRequest { id: gone.id, name: new_name, peer };
            let answer = door
                .change(|mut c| {
                    let r = request.clone();
                    async move { c.replace(r).await }
                })
                .await?;
            print_added(&answer, Some(&gone), output.output);
        }
        MemberCommand::Promote { member, no_wait, output } => {
            let member = door.find(&member).await?;
            let request = v1::MemberPromoteRequest { id: member.id, wait: Some(!no_wait) };
            let answer = door.change(|mut c| async move { c.promote(request).await }).await?;
            let later = "will be a voter when it has caught up; nothing more is to be done";
            print_done(&member, answer.done, "is a voter", later, output.output);
        }
        MemberCommand::Remove { member, no_wait, output } => {
            let member = door.find(&member).await?;
            let request = v1::MemberRemoveRequest { id: member.id, wait: Some(!no_wait) };
            let answer = door.change(|mut c| async move { c.remove(request).await }).await?;
            let later = "will be removed as soon as the leader can; nothing more is to be done";
            print_done(&member, answer.done, "is removed", later, output.output);
        }
        MemberCommand::Update { member, peer, output } => {
            let member = door.find(&member).await?;
            let request = v1::MemberUpdateRequest { id: member.id, peer };
            let answer = door
                .change(|mut c| {
                    let r = request.clone();
                    async move { c.update(r).await }
                })
                .await?;
            let member = answer.member.unwrap_or(member);
            let done = format!("is looked for at {}", member.peer);
            print_done(&member, true, &done, &done, output.output);
        }
        MemberCommand::MoveLeader { member, output } => move_leader(&door, member.as_deref(), output.output).await?,
        MemberCommand::Token { member, output } => {
            let member = door.find(&member).await?;
            let request = v1::MemberTokenRequest { id: member.id };
            let answer = door.change(|mut c| async move { c.token(request).await }).await?;
            print_line(&member, &answer.join_token, output.output);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn move_leader(door: &Door<'_>, member: Option<&str>, output: Output) -> Result<(), Failure> {
    let list = door.list().await?;
    let to = member.map(|text| find_in(&list.members, text)).transpose()?;
    let Some(leader) = list.members.iter().find(|member| member.leader) else {
        return Err(Failure::new(exit::UNAVAILABLE, "no leader is known, so there is nothing to hand over"));
    };
    // Only the leader can hand over; the member that was asked for the list may be another.
    let url = leader.client_urls.first().ok_or_else(|| {
        Failure::new(exit::UNAVAILABLE, format!("leader `{}` has not told where clients connect yet", leader.name))
    })?;
    let mut leader = MembersClient::new(connect(url, door.common.command_timeout).await.map_err(unreachable)?);
    let request = v1::MoveLeaderRequest { id: to.map_or(0, |to| to.id) };
    let moved = leader.move_leader(request).await.map_err(|status| refused(&status))?.into_inner().leader;
    let name = list.members.iter().find(|member| member.id == moved).map_or("", |member| &member.name);
    match output {
        Output::Table => out!("{name} leads"),
        Output::Json => out!("{}", json!({ "leader": moved.to_string(), "name": name })),
    }
    Ok(())
}

/// The way to the service of members, at whichever endpoint answers.
struct Door<'a> {
    common: &'a Common,
}

impl Door<'_> {
    async fn list(&self) -> Result<v1::MemberListReply, Failure> {
        self.change(|mut client| async move { client.list(v1::MemberListRequest {}).await }).await
    }

    async fn find(&self, text: &str) -> Result<v1::Member, Failure> {
        find_in(&self.list().await?.members, text)
    }

    /// Calls one endpoint after the other until one takes it. What may have happened is not tried again.
    async fn change<T, F, R>(&self, call: F) -> Result<T, Failure>
    where
        F: Fn(MembersClient<Channel>) -> R,
        R: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let mut why = Vec::new();
        for endpoint in &self.common.endpoints {
            match connect(endpoint, self.common.command_timeout).await {
                Ok(channel) => {
                    return call(MembersClient::new(channel))
                        .await
                        .map(tonic::Response::into_inner)
                        .map_err(|status| refused(&status));
                }
                Err(error) => why.push(format!("{endpoint}: {error}")),
            }
        }
        Err(unreachable(why.join("; ")))
    }
}

async fn connect(endpoint: &str, timeout: Duration) -> Result<Channel, String> {
    let url = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let endpoint = Endpoint::from_shared(url).map_err(|error| error.to_string())?;
    let endpoint = endpoint.connect_timeout(timeout).timeout(timeout + SERVER_WAIT);
    endpoint.connect().await.map_err(|error| crate::status::root_cause(&error))
}

fn unreachable(why: impl std::fmt::Display) -> Failure {
    Failure::new(exit::UNAVAILABLE, format!("no member can be reached ({why})"))
        .hint("is `tenure serve` running there? --endpoints or TENURE_ENDPOINTS say where to look")
}

fn refused(status: &tonic::Status) -> Failure {
    use tonic::Code;
    let message = status.message().to_owned();
    match status.code() {
        Code::NotFound => Failure::new(exit::NOT_FOUND, message).hint("`tenure member list` shows those that there are"),
        Code::InvalidArgument => Failure::usage(message),
        Code::FailedPrecondition => Failure::new(exit::CONFLICT, message),
        Code::ResourceExhausted => Failure::new(exit::QUOTA, message),
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => Failure::new(exit::UNAVAILABLE, message)
            .hint("a change of members needs a majority of the voters: `tenure status` shows who is there, `tenure member list` what was changed"),
        _ => Failure::new(exit::FAILURE, message),
    }
}

/// The member that is meant: by name, or by id as it is shown (hexadecimal) or as JSON has it (decimal).
fn find_in(members: &[v1::Member], text: &str) -> Result<v1::Member, Failure> {
    let by_id = |member: &&v1::Member| {
        let digits = text.trim_start_matches("0x").trim_start_matches('0');
        !digits.is_empty() && (format!("{:x}", member.id) == digits.to_lowercase() || member.id.to_string() == text)
    };
    let found = members.iter().find(|member| member.name == text).or_else(|| members.iter().find(by_id));
    found.cloned().ok_or_else(|| {
        let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
        Failure::new(exit::NOT_FOUND, format!("there is no member `{text}`"))
            .hint(format!("the members are {}", names.join(", ")))
    })
}

/// What a member is, in a word or two, and what it is about to be.
pub(crate) fn role(member: &v1::Member) -> String {
    use v1::MemberRole::{Learner, Outside, Voter};
    let is = match member.role() {
        _ if member.leader => "leader",
        Voter => "voter",
        Learner => "learner",
        Outside if !member.started => "not started",
        Outside => "outside",
    };
    match (member.role(), member.wanted()) {
        (Voter | Learner, Outside) => format!("{is}, being removed"),
        (Learner | Outside, Voter) if member.replaces != 0 => format!("{is}, replacing"),
        (Learner, Voter) => format!("{is}, catching up"),
        _ => is.to_owned(),
    }
}

pub(crate) fn as_json(member: &v1::Member) -> Value {
    let role = |role: v1::MemberRole| role.as_str_name().to_lowercase();
    let number = |n: Option<u64>| n.map(|n| n.to_string());
    json!({
        "id": member.id.to_string(), "id_hex": format!("{:016x}", member.id), "name": member.name, "peer": member.peer,
        "client_urls": member.client_urls, "role": role(member.role()), "wanted": role(member.wanted()),
        "replaces": (member.replaces != 0).then(|| member.replaces.to_string()), "leader": member.leader,
        "started": member.started, "connected": member.connected, "heard_ms": number(member.heard_ms),
        "lag": number(member.lag), "disk_free_bytes": number(member.disk_free_bytes),
        "log_bytes": number(member.log_bytes), "memory_used_bytes": number(member.memory_used_bytes),
        "version": member.version, "behaviour_version": member.behaviour_version,
        "clock_skew_ms": member.clock_skew_ms.to_string(), "alarms": member.alarms,
    })
}

fn print_list(list: &v1::MemberListReply, output: Output) {
    if let Output::Json = output {
        out!("{}", Value::Array(list.members.iter().map(as_json).collect()));
        return;
    }
    let mut members: Vec<&v1::Member> = list.members.iter().collect();
    members.sort_by(|a, b| a.name.cmp(&b.name));
    let row = |member: &&v1::Member| {
        vec![
            member.name.clone(),
            format!("{:016x}", member.id),
            role(member),
            if member.connected { "yes" } else { "no" }.to_owned(),
            member.lag.map_or_else(|| "?".to_owned(), |lag| lag.to_string()),
            member.peer.clone(),
            member.client_urls.join(","),
            member.version.clone(),
        ]
    };
    let headings = ["NAME", "ID", "ROLE", "CONNECTED", "LAG", "PEER", "CLIENTS", "VERSION"];
    print_table(&headings, &members.iter().map(row).collect::<Vec<_>>());
    if !list.has_majority {
        out!("NO MAJORITY: the member that was asked knows no leader that a majority follows");
    }
}

/// What starts a member; the folder is named after it, and its clients are served beside its peer address.
fn serve_line(member: &v1::Member, token: &str) -> String {
    let host = member.peer.rsplit_once(':').map_or("127.0.0.1", |(host, _)| host);
    format!(
        "tenure serve --name {0} --data-dir {0}-data --listen {host}:2379 --peer-listen {1} --join {token}",
        member.name, member.peer
    )
}

fn print_added(answer: &v1::MemberAddReply, replaced: Option<&v1::Member>, output: Output) {
    let Some(member) = &answer.member else { return };
    let then = match replaced {
        Some(gone) => format!("it takes the place of `{}` when it has caught up", gone.name),
        None if member.wanted() == v1::MemberRole::Learner => {
            format!("it stays a learner until `tenure member promote {}`", member.name)
        }
        None => "it is a voter when it has caught up".to_owned(),
    };
    if let Output::Table = output {
        out!("member `{}` ({:016x}) is added; {then}.", member.name, member.id);
    }
    print_line(member, &answer.join_token, output);
}

fn print_line(member: &v1::Member, token: &str, output: Output) {
    let line = serve_line(member, token);
    match output {
        Output::Json => {
            out!("{}", json!({ "member": as_json(member), "join_token": token, "command": line }));
        }
        Output::Table => {
            out!("Start it on its machine, with another --listen or --data-dir if need be, and with the --insecure or");
            out!(
                "--peer-cert, --peer-key and --peer-ca that the others have. Who has this line can be this member: keep it to yourself."
            );
            out!("\n{line}");
        }
    }
}

fn print_done(member: &v1::Member, done: bool, now: &str, later: &str, output: Output) {
    match output {
        Output::Table => out!("member `{}` {}", member.name, if done { now } else { later }),
        Output::Json => out!("{}", json!({ "id": member.id.to_string(), "name": member.name, "done": done })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, name: &str) -> v1::Member {
        v1::Member { id, name: name.to_owned(), ..Default::default() }
    }

    #[test]
    fn members_are_found_by_name_and_by_id() {
        let members = [member(0xabc, "n0"), member(7, "abc"), member(12, "n2")];
        let check = |text: &str, expected: Option<u64>| {
            assert_eq!(find_in(&members, text).ok().map(|m| m.id), expected, "{text}");
        };
        check("n0", Some(0xabc));
        check("abc", Some(7));
        check("0000000000000ABC", Some(0xabc));
        check("0xc", Some(12));
        check("12", Some(12));
        check("", None);
        check("0", None);
        check("n3", None);
    }

    #[test]
    fn roles_are_told_with_what_is_coming() {
        use v1::MemberRole::{Learner, Outside, Voter};
        let check = |is: v1::MemberRole, wanted: v1::MemberRole, expected: &str| {
            let member = v1::Member { role: is.into(), wanted: wanted.into(), ..member(1, "n") };
            assert_eq!(role(&member), expected);
        };
        check(Voter, Voter, "voter");
        check(Learner, Learner, "learner");
        check(Learner, Voter, "learner, catching up");
        check(Voter, Outside, "voter, being removed");
        check(Outside, Voter, "not started");
    }
}
