import TTTFormats

/// Makes nodes of a template's pieces.
struct TemplateParser {
    private var pieces: ArraySlice<TemplateLexer.Piece>
    private var depth = 0

    private static let deepest = 50

    init(pieces: [TemplateLexer.Piece]) {
        self.pieces = pieces[...]
    }

    /// Nodes up to a statement of one of these names, whose words come too; up to the end if there is none.
    mutating func nodes(until ends: Set<String>) throws -> (nodes: [TemplateNode], end: ExpressionParser) {
        depth += 1
        defer { depth -= 1 }
        guard depth <= Self.deepest else { throw TTTError.unsupported("The chat template has too many levels") }
        var nodes: [TemplateNode] = []
        while let piece = pieces.popFirst() {
            switch piece {
            case .text(let text): nodes.append(.text(text))
            case .expression(let tokens):
                var parser = ExpressionParser(tokens)
                nodes.append(.expression(try parser.whole()))
            case .statement(let tokens):
                var words = ExpressionParser(tokens)
                let name = try words.word()
                if ends.contains(name) { return (nodes, ExpressionParser(tokens)) }
                nodes += try statement(name, &words)
            }
        }
        guard ends.isEmpty else { throw TTTError.unsupported("The chat template ends before \(ends.sorted())") }
        return (nodes, ExpressionParser([]))
    }

    private mutating func statement(_ name: String, _ words: inout ExpressionParser) throws -> [TemplateNode] {
        switch name {
        case "generation", "endgeneration": return []  // marks what is learned in training
        case "set":
            let variable = try words.word()
            let attribute = words.take(".") ? try words.word() : nil
            try words.expect("=")
            return [.set(variable, attribute: attribute, try words.whole())]
        case "for":
            let variable = try words.word()
            guard try words.word() == "in" else { throw TTTError.unsupported("The chat template has a for without in") }
            let list = try words.whole()
            return [.loop(variable, list, try nodes(until: ["endfor"]).nodes)]
        case "if":
            var branches: [(condition: TemplateExpression?, nodes: [TemplateNode])] = []
            var condition: TemplateExpression? = try words.whole()
            while true {
                var (body, end) = try nodes(until: condition == nil ? ["endif"] : ["elif", "else", "endif"])
                branches.append((condition, body))
                let word = try end.word()
                if word == "endif" { return [.choice(branches)] }
                condition = word == "elif" ? try end.whole() : nil
            }
        default: throw TTTError.unsupported("The chat template has a statement \(name), which is not known here")
        }
    }
}

/// Makes an expression of tokens.
struct ExpressionParser {
    private var tokens: ArraySlice<TemplateLexer.Token>
    private var depth = 0

    private static let deepest = 100
    private static let longest = 500

    init(_ tokens: [TemplateLexer.Token]) {
        self.tokens = tokens[...]
    }

    private var unexpected: TTTError {
        .unsupported("The chat template has an expression that is not understood, at \(tokens.first.map { "\($0)" } ?? "its end")")
    }

    mutating func word() throws -> String {
        guard case .name(let name)? = tokens.first else { throw unexpected }
        tokens.removeFirst()
        return name
    }

    mutating func take(_ symbol: String) -> Bool {
        guard tokens.first == .symbol(symbol) || tokens.first == .name(symbol) else { return false }
        tokens.removeFirst()
        return true
    }

    mutating func expect(_ symbol: String) throws {
        guard take(symbol) else { throw unexpected }
    }

    /// All tokens.
    mutating func whole() throws -> TemplateExpression {
        // A chain of operators is as deep a tree as it is long.
        guard tokens.count <= Self.longest else {
            throw TTTError.unsupported("The chat template has too long an expression")
        }
        let expression = try self.expression()
        guard tokens.isEmpty else { throw unexpected }
        return expression
    }

    private mutating func expression() throws -> TemplateExpression {
        depth += 1
        defer { depth -= 1 }
        guard depth <= Self.deepest else { throw TTTError.unsupported("The chat template has too many levels") }
        let first = try disjunction()
        guard take("if") else { return first }
        let condition = try disjunction()
        return .choice(first, if: condition, else: take("else") ? try expression() : nil)
    }

    private mutating func disjunction() throws -> TemplateExpression {
        var left = try conjunction()
        while take("or") { left = .binary("or", left, try conjunction()) }
        return left
    }

    private mutating func conjunction() throws -> TemplateExpression {
        var left = try negation()
        while take("and") { left = .binary("and", left, try negation()) }
        return left
    }

    private mutating func negation() throws -> TemplateExpression {
        var count = 0
        while take("not") { count += 1 }
        let expression = try comparison()
        return count % 2 == 1 ? .not(expression) : expression
    }

    private mutating func comparison() throws -> TemplateExpression {
        var left = try sum()
        while true {
            if take("is") {
                let isNegated = take("not")
                let test = TemplateExpression.test(left, try word())
                left = isNegated ? .not(test) : test
            } else if take("not") {
                try expect("in")
                left = .not(.binary("in", left, try sum()))
            } else if let operation = ["==", "!=", "<=", ">=", "<", ">", "in"].first(where: { take($0) }) {
                left = .binary(operation, left, try sum())
            } else {
                return left
            }
        }
    }

    private mutating func sum() throws -> TemplateExpression {
        var left = try product()
        while let operation = ["+", "-", "~"].first(where: { take($0) }) { left = .binary(operation, left, try product()) }
        return left
    }

    private mutating func product() throws -> TemplateExpression {
        var left = try postfix()
        while let operation = ["%", "*"].first(where: { take($0) }) { left = .binary(operation, left, try postfix()) }
        return left
    }

    private mutating func postfix() throws -> TemplateExpression {
        var left = try primary()
        while true {
            if take(".") {
                let name = try word()
                if tokens.first == .symbol("(") {
                    guard name == "strip", take("("), take(")") else { throw unexpected }
                    left = .filter(left, "trim")
                } else {
                    left = .attribute(left, name)
                }
            } else if take("[") {
                left = try subscripted(left)
            } else if take("|") {
                left = .filter(left, try word())
            } else {
                return left
            }
        }
    }

    private mutating func subscripted(_ owner: TemplateExpression) throws -> TemplateExpression {
        let start = tokens.first == .symbol(":") ? nil : try expression()
        if take(":") {
            let end = tokens.first == .symbol("]") ? nil : try expression()
            try expect("]")
            return .slice(owner, start, end)
        }
        try expect("]")
        guard let start else { throw unexpected }
        return .index(owner, start)
    }

    private mutating func primary() throws -> TemplateExpression {
        if take("-") {
            guard case .number(let number)? = tokens.popFirst() else { throw unexpected }
            return .value(.number(-number))
        }
        switch tokens.popFirst() {
        case .text(let text)?: return .value(.text(text))
        case .number(let number)?: return .value(.number(number))
        case .symbol("(")?:
            let expression = try self.expression()
            try expect(")")
            return expression
        case .symbol("[")?:
            var items: [TemplateExpression] = []
            while !take("]") {
                items.append(try expression())
                if !take(",") {
                    try expect("]")
                    break
                }
            }
            return .list(items)
        case .name(let name)?: return try named(name)
        default: throw unexpected
        }
    }

    private mutating func named(_ name: String) throws -> TemplateExpression {
        switch name {
        case "true", "True": return .value(.flag(true))
        case "false", "False": return .value(.flag(false))
        case "none", "None": return .value(.none)
        default: break
        }
        guard tokens.first == .symbol("(") else { return .name(name) }
        guard ["namespace", "raise_exception"].contains(name) else {
            throw TTTError.unsupported("The chat template calls \(name), which is not known here")
        }
        try expect("(")
        var (arguments, named): ([TemplateExpression], [String: TemplateExpression]) = ([], [:])
        while !take(")") {
            if case .name(let label)? = tokens.first, tokens.dropFirst().first == .symbol("=") {
                tokens = tokens.dropFirst(2)
                named[label] = try expression()
            } else {
                arguments.append(try expression())
            }
            if !take(",") {
                try expect(")")
                break
            }
        }
        return .call(name, arguments, named)
    }
}
