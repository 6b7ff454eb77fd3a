import TTTFormats

/// Byte pair encoding: a text's characters, merged pair by pair in the order of a list.
struct BytePairEncoding: Sendable {
    private struct Pair: Hashable {
        let left: Int
        let right: Int
    }

    private struct Merge {
        let rank: Int
        let token: Int
    }

    private let vocabulary: [[UInt8]: Int]
    private let merges: [Pair: Merge]
    private let byteTokens: [Int?]?
    private let unknown: Int?
    private let fusesUnknown: Bool
    private let ignoresMerges: Bool

    init(_ json: JSON, vocabulary: [[UInt8]: Int]) throws {
        for setting in ["continuing_subword_prefix", "end_of_word_suffix"] where json[setting]?.string?.isEmpty == false {
            throw TTTError.unsupported("tokenizer.json has a \(setting), which is not known here")
        }
        self.vocabulary = vocabulary
        var merges: [Pair: Merge] = [:]
        for (rank, merge) in (json["merges"]?.array ?? []).enumerated() {
            let sides = merge.string?.utf8.split(separator: UInt8(ascii: " "), omittingEmptySubsequences: false).map { Array($0) }
                ?? merge.array?.compactMap(\.string).map { Array($0.utf8) } ?? []
            guard sides.count == 2, let left = vocabulary[sides[0]], let right = vocabulary[sides[1]],
                let token = vocabulary[sides[0] + sides[1]]
            else { throw TTTError.damaged("merge \(rank) of tokenizer.json") }
            merges[Pair(left: left, right: right)] = Merge(rank: rank, token: token)
        }
        self.merges = merges
        byteTokens = json["byte_fallback"]?.bool ?? false ? byteTokenIDs(vocabulary) : nil
        unknown = json["unk_token"]?.string.flatMap { vocabulary[Array($0.utf8)] }
        fusesUnknown = json["fuse_unk"]?.bool ?? false
        ignoresMerges = json["ignore_merges"]?.bool ?? false
    }

    /// Ids of a piece, in UTF-8.
    func callAsFunction(_ piece: [UInt8]) -> [Int] {
        if ignoresMerges, let token = vocabulary[piece] { return [token] }
        return merged(characters(piece))
    }

    private func characters(_ piece: [UInt8]) -> [Int] {
        var tokens: [Int] = []
        var isUnknown = false
        for scalar in String(decoding: piece, as: UTF8.self).unicodeScalars {
            let bytes = Array(String(scalar).utf8)
            if let token = vocabulary[bytes] {
                tokens.append(token)
                isUnknown = false
            } else if let fallback = fallback(bytes) {
                tokens += fallback
            } else if let unknown, !(isUnknown && fusesUnknown) {
                tokens.append(unknown)
                isUnknown = true
            }
        }
        return tokens
    }

    private func fallback(_ bytes: [UInt8]) -> [Int]? {
        guard let byteTokens else { return nil }
        let tokens = bytes.compactMap { byteTokens[Int($0)] }
        return tokens.count == bytes.count ? tokens : nil
    }

    /// Merges neighbours, the best pair first, the leftmost of equals.
    private func merged(_ tokens: [Int]) -> [Int] {
        var tokens = tokens
        var previous = Array(-1..<tokens.count - 1)
        var next = Array(1..<tokens.count + 1)
        var isGone = [Bool](repeating: false, count: tokens.count)
        var candidates = Heap()

        func offer(_ left: Int) {
            guard left >= 0, next[left] < tokens.count,
                let merge = merges[Pair(left: tokens[left], right: tokens[next[left]])]
            else { return }
            candidates.push(Candidate(rank: merge.rank, at: left, token: merge.token))
        }
        for left in tokens.indices { offer(left) }
        while let best = candidates.pop() {
            let left = best.at
            guard !isGone[left], next[left] < tokens.count else { continue }
            let right = next[left]
            guard merges[Pair(left: tokens[left], right: tokens[right])]?.token == best.token else { continue }
            tokens[left] = best.token
            isGone[right] = true
            next[left] = next[right]
            if next[right] < tokens.count { previous[next[right]] = left }
            offer(previous[left])
            offer(left)
        }
        return tokens.indices.filter { !isGone[$0] }.map { tokens[$0] }
    }
}

/// The ids of `<0x00>` to `<0xFF>`, as far as there are any.
func byteTokenIDs(_ vocabulary: [[UInt8]: Int]) -> [Int?] {
    (0..<0x100).map { byte in
        let digits = String(byte, radix: 16, uppercase: true)
        return vocabulary[Array("<0x\(digits.count == 1 ? "0" : "")\(digits)>".utf8)]
    }
}

/// A pair that may be merged: `token` from the one at `at` and its neighbour.
private struct Candidate {
    let rank: Int
    let at: Int
    let token: Int

    func isBefore(_ other: Candidate) -> Bool {
        (rank, at) < (other.rank, other.at)
    }
}

/// A binary heap.
private struct Heap {
    private var items: [Candidate] = []

    mutating func push(_ item: Candidate) {
        items.append(item)
        var child = items.count - 1
        while child > 0, items[child].isBefore(items[(child - 1) / 2]) {
            items.swapAt(child, (child - 1) / 2)
            child = (child - 1) / 2
        }
    }

    mutating func pop() -> Candidate? {
        guard let first = items.first, let last = items.popLast() else { return nil }
        guard !items.isEmpty else { return first }
        items[0] = last
        var parent = 0
        while true {
            var best = parent
            for child in [2 * parent + 1, 2 * parent + 2] where child < items.count {
                if items[child].isBefore(items[best]) { best = child }
            }
            guard best != parent else { return first }
            items.swapAt(parent, best)
            parent = best
        }
    }
}
