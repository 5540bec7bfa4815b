//! The machine, step by step.

use std::sync::Arc;

use super::*;
use crate::held::KEPT_BYTES;
use crate::nbd::wire::WRITE;

pub(super) const BLOCK: u64 = 512;
pub(super) const BLOCKS: usize = 6;
pub(super) const HOLD: usize = 3 * (BLOCK as usize + KEPT_BYTES);

pub(super) fn export() -> Export {
    Export {
        size: BLOCK * BLOCKS as u64,
        flags: 0x6d,
        ..Export::default()
    }
}

fn write(cookie: u64, block: u64) -> Request {
    let payload = Arc::new(vec![1; BLOCK as usize]);
    Request {
        command: WRITE,
        offset: block * BLOCK,
        length: BLOCK as u32,
        payload,
        ..Request::flush(cookie)
    }
}

/// A machine with link 1.
fn connected(hold: usize) -> Machine {
    let mut machine = Machine::new(export(), hold);
    assert!(
        machine
            .handle(Event::LinkUp {
                link: 1,
                export: export()
            })
            .is_empty()
    );
    machine
}

/// The cookies of the requests that are sent.
fn sent(actions: &[Action]) -> Vec<u64> {
    let cookie = |action: &Action| match action {
        Action::ToServer(request) => Some(request.cookie),
        _ => None,
    };
    actions.iter().filter_map(cookie).collect()
}

/// Cookies and errors of what the kernel is told.
fn told(actions: &[Action]) -> Vec<(u64, u32)> {
    let reply = |action: &Action| match action {
        Action::ToKernel(reply) => Some((reply.cookie, reply.error)),
        _ => None,
    };
    actions.iter().filter_map(reply).collect()
}

/// The sizes that the device is to have.
fn grown(actions: &[Action]) -> Vec<u64> {
    let size = |action: &Action| match action {
        Action::Grow(size) => Some(*size),
        _ => None,
    };
    actions.iter().filter_map(size).collect()
}

fn up(link: u64) -> Event {
    Event::LinkUp {
        link,
        export: export(),
    }
}

fn lost(link: u64) -> Event {
    let why = "killed".to_owned();
    Event::LinkLost { link, why }
}

fn reply(machine: &mut Machine, link: u64, cookie: u64, error: u32) -> Vec<Action> {
    let reply = Reply {
        cookie,
        error,
        payload: Payload::default(),
    };
    machine.handle(Event::Reply { link, reply })
}

#[test]
fn errors_of_the_server_are_the_kernels_to_see() {
    let mut machine = connected(HOLD);
    let cookies = sent(&machine.handle(Event::Request(write(70, 0))));
    assert_eq!(told(&reply(&mut machine, 1, cookies[0], 28)), [(70, 28)]);
    assert_eq!(machine.unfinished(), (0, 0));
}

#[test]
fn an_answer_to_nothing_ends_the_link() {
    let mut machine = connected(HOLD);
    let actions = reply(&mut machine, 1, 99, 0);
    assert!(matches!(&actions[..], [Action::Reconnect { why }] if why.contains("99")));
}

#[test]
fn an_export_that_shrank_is_not_gone_on_with() {
    let mut machine = connected(HOLD);
    machine.handle(Event::Request(write(70, 0)));
    machine.handle(Event::LinkLost {
        link: 1,
        why: String::new(),
    });
    let smaller = Export {
        size: BLOCK,
        ..export()
    };
    let actions = machine.handle(Event::LinkUp {
        link: 2,
        export: smaller,
    });
    assert!(matches!(&actions[..], [Action::Reconnect { why }] if why.contains("bytes now")));
    assert_eq!(
        sent(&machine.handle(Event::LinkUp {
            link: 3,
            export: export()
        })),
        [1]
    );
}

#[test]
fn an_export_that_grew_is_gone_on_with_once_its_server_answers_and_never_shrinks() {
    let twice = 2 * export().size;
    let larger = |link| Event::LinkUp {
        link,
        export: Export {
            size: twice,
            ..export()
        },
    };
    let behind = |cookie| Event::Request(write(cookie, BLOCKS as u64));
    let mut machine = connected(HOLD);
    machine.handle(lost(1));
    // One that hangs up at once has said nothing that counts.
    let actions = machine.handle(larger(2));
    assert_eq!((sent(&actions).len(), grown(&actions)), (1, vec![]));
    assert_eq!(told(&machine.handle(behind(70))), [(70, EINVAL)]);
    machine.handle(lost(2));
    let sign = sent(&machine.handle(up(3)));
    assert_eq!(grown(&reply(&mut machine, 3, sign[0], 0)), [0; 0]);
    machine.handle(lost(3));
    let sign = sent(&machine.handle(larger(4)));
    assert_eq!(grown(&reply(&mut machine, 4, sign[0], 0)), [twice]);
    let written = sent(&machine.handle(behind(71)));
    assert_eq!(written.len(), 1);
    machine.handle(lost(4));
    let actions = machine.handle(up(5));
    assert!(matches!(&actions[..], [Action::Reconnect { why }] if why.contains("bytes now")));
    assert_eq!(sent(&machine.handle(larger(6))), written);
    let actions = reply(&mut machine, 6, written[0], 0);
    assert_eq!((told(&actions), grown(&actions)), (vec![(71, 0)], vec![]));
}

/// The server lives: what it has would be carried out later than what comes over the next link.
#[test]
fn a_larger_export_is_gone_on_with_once_nothing_is_under_way() {
    let mut machine = connected(HOLD);
    let first = sent(&machine.handle(Event::Request(write(70, 0))));
    assert!(machine.handle(Event::Larger).is_empty());
    assert_eq!(sent(&machine.handle(Event::Request(write(71, 1)))), [0; 0]);
    let actions = reply(&mut machine, 1, first[0], 0);
    assert_eq!(told(&actions), [(70, 0)]);
    assert!(matches!(actions.last(), Some(Action::Reconnect { .. })));
    // Without a link there is none to be ended.
    assert!(machine.handle(Event::Larger).is_empty());
    assert_eq!(
        sent(&machine.handle(up(2))).len(),
        2,
        "what was held, and what waited"
    );
    let larger = Export {
        size: 2 * export().size,
        ..export()
    };
    let read_only = Export {
        flags: export().flags | 2,
        ..larger.clone()
    };
    let mut idle = connected(HOLD);
    assert_eq!(idle.is_larger(&export()), Ok(false));
    assert_eq!(idle.is_larger(&larger), Ok(true));
    assert!(idle.is_larger(&read_only).unwrap_err().contains("read-only"));
    assert!(matches!(
        &idle.handle(Event::Larger)[..],
        [Action::Reconnect { .. }]
    ));
}

/// What was under way there, and what waited for the next link, is sent over that.
#[test]
fn a_server_that_dies_while_its_link_is_to_end_is_as_any_that_dies() {
    let mut machine = connected(HOLD);
    machine.handle(Event::Request(write(70, 0)));
    machine.handle(Event::Larger);
    machine.handle(Event::Request(write(71, 1)));
    let actions = machine.handle(lost(1));
    assert!(matches!(&actions[..], [Action::Reconnect { .. }]));
    let again = sent(&machine.handle(up(2)));
    assert_eq!(again.len(), 2);
    let answers = again.iter().map(|cookie| reply(&mut machine, 2, *cookie, 0));
    let answers: Vec<_> = answers.flat_map(|actions| told(&actions)).collect();
    assert_eq!(answers, [(70, 0), (71, 0)]);
}

#[test]
fn the_first_volume_that_a_server_names_is_the_one() {
    let mut machine = connected(HOLD);
    machine.handle(Event::Request(write(70, 0)));
    let named = |link, id: &str| Event::LinkUp {
        link,
        export: Export {
            description: format!("Hypernbd volume {id}"),
            ..export()
        },
    };
    machine.handle(lost(1));
    assert_eq!(sent(&machine.handle(named(2, "a"))), [1]);
    machine.handle(lost(2));
    let actions = machine.handle(named(3, "b"));
    assert!(matches!(&actions[..], [Action::Reconnect { why }] if why.contains("volume b now")));
    assert!(machine.is_away());
    assert_eq!(sent(&machine.handle(named(4, "a"))), [1]);
}

#[test]
fn a_change_that_cannot_be_made_again_holds_everything_up() {
    let mut machine = connected(HOLD);
    machine.handle(Event::Request(write(70, 0)));
    reply(&mut machine, 1, 1, 0);
    machine.handle(Event::LinkLost {
        link: 1,
        why: String::new(),
    });
    let again = sent(&machine.handle(Event::LinkUp {
        link: 2,
        export: export(),
    }));
    assert_eq!(sent(&machine.handle(Event::Request(Request::flush(71)))), [0; 0]);
    let actions = reply(&mut machine, 2, again[0], EIO);
    assert!(matches!(&actions[..], [Action::Reconnect { .. }]) && machine.unfinished() == (1, 1));
}

#[test]
fn with_no_link_for_too_long_requests_fail_until_there_is_one_that_answers() {
    let mut machine = connected(HOLD);
    machine.handle(Event::Request(write(70, 0)));
    assert!(machine.handle(Event::GiveUp).is_empty());
    machine.handle(lost(1));
    assert_eq!(told(&machine.handle(Event::GiveUp)), [(70, EIO)]);
    assert_eq!(told(&machine.handle(Event::Request(write(71, 0)))), [(71, EIO)]);
    let sign = sent(&machine.handle(up(2)));
    assert_eq!(told(&machine.handle(Event::Request(write(72, 0)))), [(72, EIO)]);
    let read = Reply {
        cookie: sign[0],
        error: 0,
        payload: Arc::new(vec![0; BLOCK as usize]),
    };
    machine.handle(Event::Reply { link: 2, reply: read });
    assert!(!machine.is_away());
    assert_eq!(sent(&machine.handle(Event::Request(write(73, 0)))).len(), 1);
}

/// A link that comes up and dies at once is none; nor does one help over which nothing is answered.
#[test]
fn a_server_is_away_until_it_has_answered_what_counts() {
    let mut machine = connected(HOLD);
    let first = sent(&machine.handle(Event::Request(write(70, 0))));
    assert!(!machine.is_away());
    machine.handle(lost(1));
    for link in 2..5 {
        assert_eq!(sent(&machine.handle(up(link))), first);
        assert!(machine.is_away());
        machine.handle(lost(link));
    }
    machine.handle(up(5));
    let second = sent(&machine.handle(Event::Request(write(71, 1))));
    reply(&mut machine, 5, first[0], ESHUTDOWN);
    assert!(machine.is_away(), "though the other one is not answered yet");
    reply(&mut machine, 5, second[0], ESHUTDOWN);
    assert!(machine.is_away());
    machine.handle(up(6));
    assert_eq!(told(&reply(&mut machine, 6, first[0], 0)), [(70, 0)]);
    assert!(!machine.is_away());
}

/// What the kernel was told is done is done again, whatever becomes of what it waits for.
/// One change of two can be made again: the server is no more back than one that answers nothing.
#[test]
fn a_server_that_refuses_some_of_what_is_done_again_is_away() {
    let mut machine = connected(HOLD);
    for block in [0, 1] {
        let cookies = sent(&machine.handle(Event::Request(write(70 + block, block))));
        reply(&mut machine, 1, cookies[0], 0);
    }
    machine.handle(lost(1));
    for link in 2..4 {
        let again = sent(&machine.handle(up(link)));
        reply(&mut machine, link, again[0], 0);
        assert_eq!(
            machine.is_away(),
            link > 2,
            "an answer counts until one is refused"
        );
        reply(&mut machine, link, again[1], 5);
        assert!(machine.is_away());
    }
    machine.handle(Event::Request(write(72, 2)));
    assert_eq!(told(&machine.handle(Event::GiveUp)), [(72, EIO)]);
    let again = sent(&machine.handle(up(4)));
    for (nth, cookie) in again.into_iter().enumerate() {
        reply(&mut machine, 4, cookie, 0);
        assert_eq!((machine.is_away(), machine.has_given_up()), (nth == 0, nth == 0));
    }
}

#[test]
fn what_is_done_again_is_not_given_up_on() {
    let mut machine = connected(100 * HOLD);
    for cookie in [70, 71] {
        let first = sent(&machine.handle(Event::Request(write(cookie, 0))))[0];
        reply(&mut machine, 1, first, 0);
    }
    machine.handle(lost(1));
    let again = sent(&machine.handle(up(2)));
    assert_eq!(again.len(), 1, "the other one reaches the same bytes");
    machine.handle(Event::GiveUp);
    assert_eq!(sent(&reply(&mut machine, 2, again[0], 0)).len(), 1);
}

#[test]
fn a_request_that_was_given_up_on_while_under_way_keeps_its_place() {
    let mut machine = connected(HOLD);
    let first = sent(&machine.handle(Event::Request(write(70, 0))))[0];
    machine.handle(lost(1));
    machine.handle(up(2));
    assert_eq!(told(&machine.handle(Event::GiveUp)), [(70, EIO)]);
    let second = sent(&machine.handle(Event::Request(write(71, 1))));
    assert_eq!(second, [0; 0], "nothing is taken");
    // It was carried out all the same, and is held like what the kernel knows of.
    assert_eq!(told(&reply(&mut machine, 2, first, 0)), []);
    assert_eq!(machine.unfinished(), (0, 1));
    assert_eq!(sent(&machine.handle(Event::Request(write(72, 0)))).len(), 1);
}

#[test]
fn a_flush_for_room_that_fails_is_told_to_who_waits_and_to_the_next_flush() {
    let one = BLOCK as usize + KEPT_BYTES;
    let mut machine = connected(one);
    let first = sent(&machine.handle(Event::Request(write(70, 0))))[0];
    let flush = sent(&reply(&mut machine, 1, first, 0))[0];
    assert_eq!(sent(&machine.handle(Event::Request(write(71, 1)))), [0; 0]);
    assert_eq!(told(&reply(&mut machine, 1, flush, EIO)), [(71, EIO)]);
    let flush = sent(&machine.handle(Event::Request(Request::flush(72))))[0];
    assert_eq!(told(&reply(&mut machine, 1, flush, 0)), [(72, EIO)]);
    let flush = sent(&machine.handle(Event::Request(Request::flush(73))))[0];
    assert_eq!(told(&reply(&mut machine, 1, flush, 0)), [(73, 0)]);
}

#[test]
fn requests_beyond_the_end_are_refused() {
    let mut machine = connected(0);
    assert_eq!(
        told(&machine.handle(Event::Request(write(70, BLOCKS as u64)))),
        [(70, EINVAL)]
    );
}

/// What is done again can be far more than a kernel asks for, and the kernel is heard all the same: it may have detached the device.
#[test]
fn the_kernel_is_heard_while_much_is_done_again() {
    let export = Export {
        size: 4 * WAITING_MAX as u64 * BLOCK,
        ..export()
    };
    let mut machine = Machine::new(export.clone(), usize::MAX);
    let up = |link| Event::LinkUp {
        link,
        export: export.clone(),
    };
    machine.handle(up(1));
    for block in 0..2 * WAITING_MAX as u64 {
        for cookie in sent(&machine.handle(Event::Request(write(block, block)))) {
            let reply = Reply {
                cookie,
                error: 0,
                payload: Payload::default(),
            };
            machine.handle(Event::Reply { link: 1, reply });
        }
    }
    let why = "killed".to_owned();
    machine.handle(Event::LinkLost { link: 1, why });
    machine.handle(up(2));
    assert_eq!(machine.unfinished(), (0, 2 * WAITING_MAX));
    assert!(!machine.is_full());
}
